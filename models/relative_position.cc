#include "models/relative_position.h"

#include <ATen/ATen.h>

#include <cmath>

namespace routecast {

// The order of operations decides the bucket at the borders (distance 64 -> 14), so it is
// the reference's.
at::Tensor RelativeBuckets(at::Tensor relative, bool bidirectional, int64_t buckets,
                           int64_t max_distance) {
  at::Tensor result = at::zeros_like(relative);
  if (bidirectional) {
    buckets /= 2;
    result = (relative > 0).to(at::kLong) * buckets;
    relative = relative.abs();
  } else {
    relative = -at::minimum(relative, at::zeros_like(relative));
  }
  const int64_t exact = buckets / 2;
  at::Tensor large =
      exact + (at::log(relative.to(at::kFloat) / static_cast<double>(exact)) /
               std::log(static_cast<double>(max_distance) / static_cast<double>(exact)) *
               static_cast<double>(buckets - exact))
                  .to(at::kLong);
  large = at::minimum(large, at::full_like(large, buckets - 1));
  return result + at::where(relative < exact, relative, large);
}

}  // namespace routecast
