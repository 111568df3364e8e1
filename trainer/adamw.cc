#include "trainer/adamw.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <optional>

namespace routecast {
namespace {

// Of a checkpoint's tensors: a member's part has the member in its name.
std::string StateName(const ParameterSlice& slice) {
  return slice.index < 0 ? slice.name : slice.name + "#" + std::to_string(slice.index);
}

}  // namespace

AdamW::AdamW(const Parameters& parameters, AdamWOptions options)
    : AdamW({AdamWGroup{SlicesOf(parameters), options.weight_decay}}, options) {}

AdamW::AdamW(const std::vector<AdamWGroup>& groups, AdamWOptions options)
    : options_(options) {
  for (size_t rate = 0; rate < groups.size(); ++rate) {
    std::vector<ParameterSlice> decayed, others;
    for (const ParameterSlice& slice : groups[rate].parameters) {
      (slice.Value().dim() >= 2 ? decayed : others).push_back(slice);
    }
    Add(decayed, rate, groups[rate].weight_decay);
    Add(others, rate, 0);
  }
}

void AdamW::Add(const std::vector<ParameterSlice>& slices, size_t rate,
                double weight_decay) {
  Group group{rate, weight_decay, slices, {}, {}, {}};
  for (const ParameterSlice& slice : slices) {
    const at::Tensor value = slice.Value().detach();
    group.first.push_back(at::zeros_like(value));
    group.second.push_back(at::zeros_like(value));
    group.steps.push_back(at::zeros({}, value.options().dtype(at::kFloat)));
  }
  groups_.push_back(std::move(group));
}

void AdamW::Step(double learning_rate) {
  Step(std::vector<double>(groups_.size(), learning_rate));
}

void AdamW::Step(const std::vector<double>& learning_rates, const at::Tensor& skip,
                 std::optional<double> beta1) {
  const c10::NoGradGuard no_grad;
  const auto found = skip.defined() ? std::optional(skip) : std::nullopt;
  for (Group& g : groups_) {
    if (g.slices.empty() || learning_rates.at(g.rate) < 0) continue;
    std::vector<at::Tensor> parameters, gradients;
    for (const ParameterSlice& slice : g.slices) {
      parameters.push_back(slice.Value());
      gradients.push_back(slice.Gradient());
    }
    if (found) {
      at::_foreach_add_(g.steps, 1 - skip);
    } else {
      at::_foreach_add_(g.steps, 1);
    }
    at::_fused_adamw_(parameters, gradients, g.first, g.second, /*max_exp_avg_sqs=*/{},
                      g.steps, learning_rates.at(g.rate), beta1.value_or(options_.beta1),
                      options_.beta2, g.weight_decay, options_.epsilon, /*amsgrad=*/false,
                      /*maximize=*/false, /*grad_scale=*/std::nullopt, found);
  }
}

Parameters AdamW::State() const {
  Parameters state;
  for (const Group& g : groups_) {
    for (size_t i = 0; i < g.slices.size(); ++i) {
      const std::string name = StateName(g.slices[i]);
      state.Add(name + ".exp_avg", g.first[i]);
      state.Add(name + ".exp_avg_sq", g.second[i]);
      state.Add(name + ".step", g.steps[i]);
    }
  }
  return state;
}

void AdamW::Load(const Parameters& state) {
  const c10::NoGradGuard no_grad;
  for (Group& g : groups_) {
    for (size_t i = 0; i < g.slices.size(); ++i) {
      const std::string name = StateName(g.slices[i]);
      g.first[i].copy_(state.Get(name + ".exp_avg"));
      g.second[i].copy_(state.Get(name + ".exp_avg_sq"));
      g.steps[i].copy_(state.Get(name + ".step"));
    }
  }
}

}  // namespace routecast
