#include "models/rms_norm.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>

#include "common/wide_loops.h"
#include "models/rms_norm_body.h"

namespace routecast {
namespace {

constexpr int64_t kGrainNumbers = 1 << 15;
constexpr int kLanes = 16;

bool OnePassWill(const at::Tensor& x, const at::Tensor& gain) {
  return x.scalar_type() == gain.scalar_type() && x.is_contiguous() &&
         gain.is_contiguous() && (x.is_cpu() || x.is_cuda()) &&
         (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16 ||
          x.scalar_type() == at::kHalf) &&
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

static void NormRowsCpu(const NormArgs& args, int type) {
  at::parallel_for(0, args.rows, std::max<int64_t>(1, kGrainNumbers / args.width),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t r = begin; r < end; ++r) {
                       if (type == 0) {
                         NormRow(static_cast<const float*>(args.x) + r * args.width,
                                 static_cast<const float*>(args.gain), args.width,
                                 args.epsilon,
                                 static_cast<float*>(args.y) + r * args.width);
                       } else if (type == 1) {
                         NormOneRow<c10::BFloat16>(OneLane(), args, r);
                       } else {
                         NormOneRow<c10::Half>(OneLane(), args, r);
                       }
                     }
                   });
}

at::Tensor RmsNorm(const at::Tensor& x, const at::Tensor& gain, double epsilon) {
  if (!OnePassWill(x, gain)) {
    const at::Tensor mean = x.to(at::kFloat).pow(2).mean(-1, /*keepdim=*/true);
    return gain * (x * at::rsqrt(mean + epsilon)).to(gain.scalar_type());
  }
  const c10::DeviceGuard guard(x.device());
  const at::Tensor y = at::empty_like(x);
  const int64_t width = gain.size(0);
  const NormArgs args{x.const_data_ptr(),
                      gain.const_data_ptr(),
                      y.mutable_data_ptr(),
                      x.numel() / std::max<int64_t>(width, 1),
                      width,
                      static_cast<float>(epsilon)};
  const int type = x.scalar_type() == at::kFloat      ? 0
                   : x.scalar_type() == at::kBFloat16 ? 1
                                                      : 2;
  (x.is_cuda() ? NormRowsCuda : NormRowsCpu)(args, type);
  return y;
}

}  // namespace routecast
