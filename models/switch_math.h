// Small steps that the Switch Transformer's passes share. Any thread.
#pragma once

#include <ATen/ATen.h>

#include <limits>

namespace routecast {

inline double LowestOf(at::ScalarType type) {
  if (type == at::kHalf) return -65504.0;
  if (type == at::kBFloat16) return -3.3895313892515355e38;
  return std::numeric_limits<float>::lowest();
}

// Additive mask [B,1,1,S]: 0 where valid, the dtype's lowest number elsewhere.
inline at::Tensor KeyMask(const at::Tensor& valid_BS, const at::Tensor& like) {
  return ((1.0 - valid_BS.to(like.options())) * LowestOf(like.scalar_type()))
      .unsqueeze(1)
      .unsqueeze(1);
}

// The reference's guard of fp16 after each residual: infinities become large numbers.
inline at::Tensor Clamped(const at::Tensor& x) {
  if (x.scalar_type() != at::kHalf) return x;
  constexpr double kMax = 65504.0;
  // On the device: to ask the host for the limit would be to wait at every residual.
  const at::Tensor limit = kMax - 1000 * at::isinf(x).any().to(x.scalar_type());
  return at::clamp(x, -limit, limit);
}

}  // namespace routecast
