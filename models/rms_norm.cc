#include "models/rms_norm.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>

#include "common/wide_loops.h"

namespace routecast {
namespace {

constexpr int64_t kGrainNumbers = 1 << 15;
constexpr int kLanes = 16;

bool OnePassWill(const at::Tensor& x, const at::Tensor& gain) {
  return x.device().is_cpu() && x.scalar_type() == at::kFloat &&
         gain.scalar_type() == at::kFloat && x.is_contiguous() && gain.is_contiguous() &&
         !(c10::GradMode::is_enabled() && (x.requires_grad() || gain.requires_grad()));
}

}  // namespace

// Sums in lanes, so that the compiler may use vectors without reordering a sum.
ROUTECAST_WIDE static void NormRow(const float* x, const float* gain, int64_t width,
                                   float epsilon, float* y) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) lanes[k] += x[i + k] * x[i + k];
  }
  float sum = 0;
  for (; i < width; ++i) sum += x[i] * x[i];
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  }
  sum += lanes[0];
  const float scale = 1 / std::sqrt(sum / static_cast<float>(width) + epsilon);
  for (int64_t j = 0; j < width; ++j) y[j] = gain[j] * (x[j] * scale);
}

at::Tensor RmsNorm(const at::Tensor& x, const at::Tensor& gain, double epsilon) {
  if (!OnePassWill(x, gain)) {
    const at::Tensor mean = x.to(at::kFloat).pow(2).mean(-1, /*keepdim=*/true);
    return gain * (x * at::rsqrt(mean + epsilon)).to(gain.scalar_type());
  }
  const at::Tensor y = at::empty_like(x);
  const int64_t width = gain.size(0), rows = x.numel() / std::max<int64_t>(width, 1);
  const float* from = x.const_data_ptr<float>();
  const float* gains = gain.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrainNumbers / width),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t r = begin; r < end; ++r) {
                       NormRow(from + r * width, gains, width,
                               static_cast<float>(epsilon), to + r * width);
                     }
                   });
  return y;
}

}  // namespace routecast
