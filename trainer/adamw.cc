#include "trainer/adamw.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

namespace routecast {

AdamW::AdamW(const Parameters& parameters, AdamWOptions options) : options_(options) {
  groups_[0].weight_decay = options.weight_decay;
  for (const auto& [name, tensor] : parameters.items()) {
    Group& g = groups_[tensor.dim() >= 2 ? 0 : 1];
    g.names.push_back(name);
    g.parameters.push_back(tensor);
    g.first.push_back(at::zeros_like(tensor.detach()));
    g.second.push_back(at::zeros_like(tensor.detach()));
    g.steps.push_back(
        at::zeros({}, tensor.options().dtype(at::kFloat).requires_grad(false)));
  }
}

void AdamW::Step(double learning_rate) {
  const c10::NoGradGuard no_grad;
  for (Group& g : groups_) {
    if (g.parameters.empty()) continue;
    std::vector<at::Tensor> gradients;
    for (const at::Tensor& p : g.parameters) gradients.push_back(p.grad());
    at::_foreach_add_(g.steps, 1);
    at::_fused_adamw_(g.parameters, gradients, g.first, g.second, /*max_exp_avg_sqs=*/{},
                      g.steps, learning_rate, options_.beta1, options_.beta2,
                      g.weight_decay, options_.epsilon, /*amsgrad=*/false,
                      /*maximize=*/false);
  }
}

Parameters AdamW::State() const {
  Parameters state;
  for (const Group& g : groups_) {
    for (size_t i = 0; i < g.names.size(); ++i) {
      state.Add(g.names[i] + ".exp_avg", g.first[i]);
      state.Add(g.names[i] + ".exp_avg_sq", g.second[i]);
      state.Add(g.names[i] + ".step", g.steps[i]);
    }
  }
  return state;
}

void AdamW::Load(const Parameters& state) {
  const c10::NoGradGuard no_grad;
  for (Group& g : groups_) {
    for (size_t i = 0; i < g.names.size(); ++i) {
      g.first[i].copy_(state.Get(g.names[i] + ".exp_avg"));
      g.second[i].copy_(state.Get(g.names[i] + ".exp_avg_sq"));
      g.steps[i].copy_(state.Get(g.names[i] + ".step"));
    }
  }
}

}  // namespace routecast
