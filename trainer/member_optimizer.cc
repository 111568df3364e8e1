#include "trainer/member_optimizer.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "common/errors.h"
#include "trainer/divergence.h"

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
  std::vector<double> clips;
  for (const MemberOptions& o : training_) clips.push_back(o.clip_norm);
  clip_M = at::tensor(clips, at::kDouble).to(parts_.at(0).slices.at(0).Value().device());
  if (ema_ == 0) return;
  for (const auto& [name, tensor] : parameters_.items()) {
    averages_.Add(name, tensor.detach().clone());
  }
}

std::vector<ParameterSlice> MemberOptimizer::TrainedSlices(size_t m,
                                                           int64_t epoch) const {
  std::vector<ParameterSlice> slices;
  for (const Part& part : parts_) {
    if (part.member != m || epoch < part.released_at) continue;
    slices.insert(slices.end(), part.slices.begin(), part.slices.end());
  }
  return slices;
}

void MemberOptimizer::Step(double share, int64_t epoch, std::optional<double> beta1) {
  const c10::NoGradGuard no_grad;
  epoch_ = epoch;
  slice_norms_.clear();
  std::vector<std::vector<at::Tensor>> gradients(training_.size());
  std::vector<at::Tensor> norms;
  for (size_t m = 0; m < training_.size(); ++m) {
    for (const ParameterSlice& slice : TrainedSlices(m, epoch)) {
      gradients[m].push_back(slice.Gradient());
    }
    slice_norms_.push_back(at::stack(at::_foreach_norm(gradients[m], 2)));
    norms.push_back(slice_norms_.back().to(at::kDouble).norm());
  }
  norm_M = at::stack(norms);
  broken_ = norm_M.isfinite().all().logical_not().to(at::kFloat);
  const at::Tensor scale_M =
      at::where(norm_M > clip_M, clip_M / norm_M, 1.0).to(at::kFloat);
  for (size_t m = 0; m < training_.size(); ++m) {
    at::_foreach_mul_(gradients[m], scale_M.select(0, static_cast<int64_t>(m)));
  }
  std::vector<double> rates;
  for (const Part& part : parts_) {
    const bool frozen = epoch < part.released_at;
    rates.push_back(frozen ? -1 : training_[part.member].learning_rate * share);
  }
  adamw_.Step(rates, broken_, beta1);
  for (const auto& [name, average] : averages_.items()) {
    at::Tensor(average).lerp_(parameters_.Get(name).detach(), 1 - ema_);
  }
}

void MemberOptimizer::RequireFinite() const {
  if (!broken_.defined() || broken_.item<float>() == 0) return;
  for (size_t m = 0; m < training_.size(); ++m) {
    const at::Tensor norms = slice_norms_[m].to(at::kDouble).cpu();
    const auto slices = TrainedSlices(m, epoch_);
    for (size_t i = 0; i < slices.size(); ++i) {
      if (std::isfinite(norms.const_data_ptr<double>()[i])) continue;
      throw DivergedError(ErrorText(
          "the gradient of " + slices[i].name + " is not finite",
          "member " + std::to_string(m) + "; the step was not taken", kDivergedAdvice));
    }
  }
  throw DivergedError(ErrorText("the norm of the gradients is not finite",
                                "each tensor's own is; the step was not taken",
                                kDivergedAdvice));
}

double MemberOptimizer::GradientNorm() const { return norm_M.max().item<double>(); }

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
