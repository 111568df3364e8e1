#include "trainer/member_optimizer.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace routecast {
namespace {

std::vector<AdamWGroup> GroupsOf(const std::vector<std::vector<ParameterSlice>>& members,
                                 const std::vector<MemberOptions>& training) {
  std::vector<AdamWGroup> groups;
  for (size_t m = 0; m < members.size(); ++m) {
    groups.push_back({members[m], training.at(m).weight_decay});
  }
  return groups;
}

AdamWOptions OptionsOf(double beta1, double beta2) {
  AdamWOptions options;
  options.beta1 = beta1;
  options.beta2 = beta2;
  return options;
}

}  // namespace

MemberOptimizer::MemberOptimizer(const SpeculationModel& model,
                                 std::vector<MemberOptions> training, double beta1,
                                 double beta2, double ema)
    : parameters_(model.parameters()),
      members_(model.MemberParameters()),
      training_(std::move(training)),
      ema_(ema),
      adamw_(GroupsOf(members_, training_), OptionsOf(beta1, beta2)) {
  if (ema_ == 0) return;
  for (const auto& [name, tensor] : parameters_.items()) {
    averages_.Add(name, tensor.detach().clone());
  }
}

std::vector<double> MemberOptimizer::Norms() const {
  std::vector<double> norms;
  for (const auto& member : members_) {
    std::vector<at::Tensor> gradients;
    for (const ParameterSlice& slice : member) gradients.push_back(slice.Gradient());
    const auto each = at::stack(at::_foreach_norm(gradients, 2));
    norms.push_back(each.to(at::kDouble).norm().item<double>());
  }
  return norms;
}

double MemberOptimizer::Step(double share) {
  const c10::NoGradGuard no_grad;
  const std::vector<double> norms = Norms();
  std::vector<double> rates;
  for (size_t m = 0; m < members_.size(); ++m) {
    rates.push_back(training_[m].learning_rate * share);
    if (!std::isfinite(norms[m])) {
      for (const ParameterSlice& slice : members_[m]) {
        if (at::isfinite(slice.Gradient()).all().item<bool>()) continue;
        throw std::logic_error("the gradient of " + slice.name + " (member " +
                               std::to_string(m) + ") is not finite");
      }
    }
    if (norms[m] <= training_[m].clip_norm) continue;
    for (const ParameterSlice& slice : members_[m]) {
      slice.Gradient().mul_(training_[m].clip_norm / norms[m]);
    }
  }
  adamw_.Step(rates);
  for (const auto& [name, average] : averages_.items()) {
    at::Tensor(average).lerp_(parameters_.Get(name).detach(), 1 - ema_);
  }
  return *std::max_element(norms.begin(), norms.end());
}

double MemberOptimizer::LearningRate(double share) const {
  double rate = 0;
  for (const MemberOptions& o : training_) rate = std::max(rate, o.learning_rate * share);
  return rate;
}

void MemberOptimizer::SwapAverages() {
  const c10::NoGradGuard no_grad;
  for (const auto& [name, average] : averages_.items()) {
    at::Tensor parameter = parameters_.Get(name);
    const at::Tensor kept = parameter.detach().clone();
    parameter.copy_(average);
    at::Tensor(average).copy_(kept);
  }
}

}  // namespace routecast
