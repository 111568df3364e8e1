#include "models/activation.h"

#include <ATen/ATen.h>

#include <cmath>
#include <numbers>
#include <stdexcept>

namespace routecast {

at::Tensor Activate(Activation activation, const at::Tensor& x) {
  switch (activation) {
    case Activation::kRelu:
      return at::relu(x);
    case Activation::kGelu:
      return at::gelu(x);
    case Activation::kGeluNew: {
      // Not at::gelu(x, "tanh"): that rounds once, and the reference at every step.
      const double scale = std::sqrt(2.0 / std::numbers::pi);
      return 0.5 * x * (1.0 + at::tanh(scale * (x + 0.044715 * at::pow(x, 3.0))));
    }
    case Activation::kSilu:
      return at::silu(x);
  }
  throw std::logic_error("unknown activation");
}

}  // namespace routecast
