#include "trainer/member_optimizer.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <stdexcept>

#include "common/errors.h"
#include "trainer/speculation_loss.h"

namespace routecast {
namespace {

AdamWOptions OptionsOf(double beta1, double beta2) {
  AdamWOptions options;
  options.beta1 = beta1;
  options.beta2 = beta2;
  return options;
}

}  // namespace

std::vector<MemberOptimizer::Part> MemberOptimizer::PartsOf(const SpeculationModel& model,
                                                            const LayerFreezing& freeze) {
  std::vector<Part> parts;
  bool any = false;
  const auto members = model.MemberParameters();
  for (size_t m = 0; m < members.size(); ++m) {
    std::map<int64_t, std::vector<ParameterSlice>> by_epoch;
    for (const ParameterSlice& slice : members[m]) {
      by_epoch[freeze.ReleasedAt(slice.name)].push_back(slice);
    }
    for (auto& [epoch, slices] : by_epoch) {
      any = any || epoch > 0;
      parts.push_back({m, epoch, std::move(slices)});
    }
  }
  if (freeze.layers > 0 && !any) {
    throw UsageError(ErrorText("--freeze_layers: this kind has no layers to freeze",
                               "--kind=" + model.config().kind,
                               "leave it out, or use --kind=interlayer"));
  }
  return parts;
}

std::vector<AdamWGroup> MemberOptimizer::Groups() const {
  std::vector<AdamWGroup> groups;
  for (const Part& part : parts_) {
    groups.push_back({part.slices, training_.at(part.member).weight_decay});
  }
  return groups;
}

MemberOptimizer::MemberOptimizer(const SpeculationModel& model,
                                 std::vector<MemberOptions> training, double beta1,
                                 double beta2, double ema, LayerFreezing freeze)
    : parameters_(model.parameters()),
      parts_(PartsOf(model, freeze)),
      training_(std::move(training)),
      ema_(ema),
      adamw_(Groups(), OptionsOf(beta1, beta2)) {
  if (ema_ == 0) return;
  for (const auto& [name, tensor] : parameters_.items()) {
    averages_.Add(name, tensor.detach().clone());
  }
}

std::vector<double> MemberOptimizer::Norms(int64_t epoch) const {
  std::vector<std::vector<at::Tensor>> gradients(training_.size());
  for (const Part& part : parts_) {
    if (epoch < part.released_at) continue;
    for (const ParameterSlice& slice : part.slices) {
      gradients[part.member].push_back(slice.Gradient());
    }
  }
  std::vector<double> norms;
  for (const auto& member : gradients) {
    const auto each = at::stack(at::_foreach_norm(member, 2));
    norms.push_back(each.to(at::kDouble).norm().item<double>());
  }
  return norms;
}

double MemberOptimizer::Step(double share, int64_t epoch) {
  const c10::NoGradGuard no_grad;
  const std::vector<double> norms = Norms(epoch);
  std::vector<double> rates;
  for (const Part& part : parts_) {
    const MemberOptions& training = training_[part.member];
    const double norm = norms[part.member];
    const bool frozen = epoch < part.released_at;
    rates.push_back(frozen ? -1 : training.learning_rate * share);
    if (frozen) continue;
    if (!std::isfinite(norm)) {
      for (const ParameterSlice& slice : part.slices) {
        if (at::isfinite(slice.Gradient()).all().item<bool>()) continue;
        throw DivergedError("the gradient of " + slice.name + " (member " +
                            std::to_string(part.member) + ") is not finite");
      }
    }
    if (norm <= training.clip_norm) continue;
    for (const ParameterSlice& slice : part.slices) {
      slice.Gradient().mul_(training.clip_norm / norm);
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
