// RMS layer norm of T5: no mean, no bias.
#pragma once

#include <ATen/core/Tensor.h>

namespace routecast {

// x / sqrt(mean(x^2) + epsilon) * gain over the last dimension [D]; the mean in float32,
// the quotient rounded to the gain's dtype before the product. Any thread; gradients
// flow. Without gradients one pass over memory instead of five.
at::Tensor RmsNorm(const at::Tensor& x, const at::Tensor& gain_D, double epsilon);

}  // namespace routecast
