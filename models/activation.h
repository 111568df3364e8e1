// Activations of feed-forward layers, by the names of Hugging Face's dense_act_fn.
// Pure functions: any thread. The names need no LibTorch (activation_names.cc).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace at {
class Tensor;
}

namespace routecast {

enum class Activation : uint8_t {
  kRelu,
  kGelu,     // exact, by the error function
  kGeluNew,  // by the hyperbolic tangent, each step rounded to the tensor's dtype
  kSilu
};

const std::vector<std::string>& ActivationNames();  // relu gelu gelu_new silu
const std::string& ActivationName(Activation activation);
std::optional<Activation> FindActivation(const std::string& name);
// The same shape and dtype; differentiable.
at::Tensor Activate(Activation activation, const at::Tensor& x);

}  // namespace routecast
