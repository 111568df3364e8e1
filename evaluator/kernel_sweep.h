// How fast a device multiplies matrices: what a device profile says of its kernels.
#pragma once

#include <ATen/core/Tensor.h>

namespace routecast {

// Floating-point operations a second (a multiply-add is two) of the best of several
// square products of `size` in `dtype`, over about `seconds`. Throws StoppedError.
double MeasureProducts(at::Device device, at::ScalarType dtype, int64_t size,
                       double seconds);

}  // namespace routecast
