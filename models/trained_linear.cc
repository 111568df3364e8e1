#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>
#include <vector>

#include "models/onednn_linear.h"

namespace routecast {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Fewer: the library's product starts faster.
constexpr int64_t kFewRows = 128;

// [N,D] [F,D] -> [N,F], or [M,N,D] [M,F,D] -> [M,N,F].
at::Tensor Multiply(const at::Tensor& x, const at::Tensor& weight) {
  if (weight.dim() == 2) return OneDnnLinear(x, weight);
  const at::Tensor out = at::empty({x.size(0), x.size(1), weight.size(1)}, x.options());
  for (int64_t m = 0; m < weight.size(0); ++m)
    out[m].copy_(OneDnnLinear(x[m], weight[m]));
  return out;
}

class LinearFunction : public torch::autograd::Function<LinearFunction> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x,
                            const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias) {
    const at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({x, weight});
    context->saved_data["biased"] = bias.has_value();
    at::Tensor out = Multiply(x, weight);
    if (bias) out.add_(bias->unsqueeze(-2));
    return out;
  }
  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor out = gradients[0].contiguous();
    variable_list in(3);
    if (context->needs_input_grad(0)) in[0] = Multiply(out, saved[1].transpose(-1, -2));
    if (context->needs_input_grad(1)) {
      in[1] = at::matmul(out.transpose(-1, -2), saved[0]);
    }
    // An input that is not there has no number to ask for.
    const bool biased = context->saved_data["biased"].toBool();
    if (biased && context->needs_input_grad(2)) in[2] = out.sum(-2);
    return in;
  }
};

bool TakesOneDnn(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  const int64_t width = x.size(-1), rows = width > 0 ? x.numel() / width : 0;
  const int64_t members = weight.dim() == 3 ? weight.size(0) : 1;
  return rows >= kFewRows * members && x.is_cpu() && x.scalar_type() == at::kFloat &&
         weight.scalar_type() == at::kFloat && weight.is_contiguous() &&
         (!bias.defined() || bias.scalar_type() == at::kFloat) &&
         !at::autocast::is_autocast_enabled(at::kCPU) && PrefersOneDnn();
}

at::Tensor ByLibrary(const at::Tensor& x, const at::Tensor& weight,
                     const at::Tensor& bias) {
  if (weight.dim() == 2) {
    return bias.defined() ? at::linear(x, weight, bias) : at::linear(x, weight);
  }
  const at::Tensor columns = weight.transpose(1, 2);
  return bias.defined() ? at::baddbmm(bias.unsqueeze(1), x, columns)
                        : at::bmm(x, columns);
}

}  // namespace

at::Tensor TrainedLinear(const at::Tensor& x, const at::Tensor& weight,
                         const at::Tensor& bias) {
  if (!TakesOneDnn(x, weight, bias)) return ByLibrary(x, weight, bias);
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = weight.size(-2);
  const at::Tensor rows =
      (weight.dim() == 3 ? x : x.reshape({-1, x.size(-1)})).contiguous();
  return LinearFunction::apply(
             rows, weight,
             bias.defined() ? std::optional<at::Tensor>(bias) : std::nullopt)
      .view(shape);
}

}  // namespace routecast
