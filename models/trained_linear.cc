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

at::Tensor Multiply(const at::Tensor& x_ND, const at::Tensor& weight_FD) {
  const int64_t rows = x_ND.size(0);
  if (OneDnnRows(rows) == rows) return OneDnnLinear(x_ND, weight_FD);
  at::Tensor out = at::empty({rows, weight_FD.size(0)}, x_ND.options());
  for (int64_t row = 0; row < rows;) {
    const int64_t block = OneDnnRows(rows - row), taken = block > 0 ? block : rows - row;
    at::Tensor to = out.narrow(0, row, taken);
    const at::Tensor part = x_ND.narrow(0, row, taken);
    if (block > 0) {
      to.copy_(OneDnnLinear(part, weight_FD));
    } else {
      at::mm_out(to, part, weight_FD.t());
    }
    row += taken;
  }
  return out;
}

class LinearFunction : public torch::autograd::Function<LinearFunction> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x_ND,
                            const at::Tensor& weight_FD,
                            const std::optional<at::Tensor>& bias_F) {
    const at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({x_ND, weight_FD});
    context->saved_data["biased"] = bias_F.has_value();
    at::Tensor out = Multiply(x_ND, weight_FD);
    if (bias_F) out.add_(*bias_F);
    return out;
  }
  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor out = gradients[0].contiguous();
    variable_list in(3);
    if (context->needs_input_grad(0)) in[0] = Multiply(out, saved[1].t());
    if (context->needs_input_grad(1)) in[1] = at::mm(out.t(), saved[0]);
    // An input that is not there has no number to ask for.
    const bool biased = context->saved_data["biased"].toBool();
    if (biased && context->needs_input_grad(2)) in[2] = out.sum(0);
    return in;
  }
};

bool TakesOneDnn(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  const int64_t width = x.size(-1), rows = width > 0 ? x.numel() / width : 0;
  return rows >= kFewRows && x.is_cpu() && x.scalar_type() == at::kFloat &&
         weight.scalar_type() == at::kFloat && weight.is_contiguous() &&
         weight.dim() == 2 && (!bias.defined() || bias.scalar_type() == at::kFloat) &&
         !at::autocast::is_autocast_enabled(at::kCPU) && PrefersOneDnn();
}

}  // namespace

at::Tensor TrainedLinear(const at::Tensor& x, const at::Tensor& weight,
                         const at::Tensor& bias) {
  if (!TakesOneDnn(x, weight, bias)) {
    return bias.defined() ? at::linear(x, weight, bias) : at::linear(x, weight);
  }
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = weight.size(0);
  return LinearFunction::apply(
             x.reshape({-1, x.size(-1)}).contiguous(), weight,
             bias.defined() ? std::optional<at::Tensor>(bias) : std::nullopt)
      .view(shape);
}

}  // namespace routecast
