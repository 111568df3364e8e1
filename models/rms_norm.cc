#include "models/rms_norm.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <bit>
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

using Bf16 = uint16_t;  // the upper half of a float

[[gnu::always_inline]] static inline float Wide(float x) { return x; }
[[gnu::always_inline]] static inline float Wide(Bf16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x) << 16);
}
[[gnu::always_inline]] static inline void Narrow(float x, float* to) { *to = x; }
// To the nearest, ties to even, as the library does it.
[[gnu::always_inline]] static inline void Narrow(float x, Bf16* to) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  *to = static_cast<Bf16>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

// Sums in lanes, so that the compiler may use vectors without reordering a sum.
template <class T>
[[gnu::always_inline]] static inline void NormOne(const T* x, const T* gain,
                                                  int64_t width, float epsilon, T* y) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) lanes[k] += Wide(x[i + k]) * Wide(x[i + k]);
  }
  float sum = 0;
  for (; i < width; ++i) sum += Wide(x[i]) * Wide(x[i]);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  }
  sum += lanes[0];
  const float scale = 1 / std::sqrt(sum / static_cast<float>(width) + epsilon);
  for (int64_t j = 0; j < width; ++j) {
    T quotient;
    Narrow(Wide(x[j]) * scale, &quotient);
    Narrow(Wide(gain[j]) * Wide(quotient), &y[j]);
  }
}
ROUTECAST_WIDE static void NormRow(const float* x, const float* gain, int64_t width,
                                   float epsilon, float* y) {
  NormOne(x, gain, width, epsilon, y);
}
ROUTECAST_WIDE static void NormRow(const Bf16* x, const Bf16* gain, int64_t width,
                                   float epsilon, Bf16* y) {
  NormOne(x, gain, width, epsilon, y);
}
template <class T>
static void NormRowOf(const NormArgs& a, int64_t row) {
  NormRow(static_cast<const T*>(a.x) + row * a.width, static_cast<const T*>(a.gain),
          a.width, a.epsilon, static_cast<T*>(a.y) + row * a.width);
}

static void NormRowsCpu(const NormArgs& args, int type) {
  at::parallel_for(0, args.rows, std::max<int64_t>(1, kGrainNumbers / args.width),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t r = begin; r < end; ++r) {
                       if (type == 0) {
                         NormRowOf<float>(args, r);
                       } else if (type == 1) {
                         NormRowOf<Bf16>(args, r);
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
