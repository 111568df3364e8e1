#include "trainer/best_parameters.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

namespace routecast {
namespace {

std::string NameOf(int64_t step) {
  return "best-" + std::to_string(step) + ".safetensors";
}

fs::path FileOf(const fs::path& folder, int64_t step) { return folder / NameOf(step); }

}  // namespace

std::string BestParameters::file_name() const { return NameOf(step_); }

void BestParameters::Offer(double score, int64_t step, const Parameters& parameters,
                           int plateau_patience) {
  if (step_ == 0 || score < score_) {
    score_ = score;
    step_ = step;
    worse_ = since_lowered_ = 0;
    best_ = Parameters();
    for (const auto& [name, tensor] : parameters.items()) {
      best_.Add(name, tensor.detach().clone());
    }
    return;
  }
  ++worse_;
  if (++since_lowered_ < plateau_patience) return;
  ++lowered_;
  since_lowered_ = 0;
}

void BestParameters::CopyTo(const Parameters& parameters) const {
  const c10::NoGradGuard no_grad;
  if (step_ == 0) return;
  for (const auto& [name, tensor] : parameters.items()) tensor.copy_(best_.Get(name));
}

void BestParameters::Write(const fs::path& folder) const {
  // One that is there may be of a run that was killed before its first checkpoint.
  if (step_ == 0 || (step_ == written_step_ && fs::exists(FileOf(folder, step_)))) {
    return;
  }
  WriteParameters(FileOf(folder, step_), best_, at::kFloat);
  written_step_ = step_;
}

Json BestParameters::ToJson() const {
  return {{"best_score", score_},
          {"best_step", step_},
          {"worse", worse_},
          {"lowered", lowered_},
          {"since_lowered", since_lowered_}};
}

void BestParameters::Load(const fs::path& folder, const Json& json) {
  score_ = json.at("best_score");
  step_ = json.at("best_step");
  worse_ = json.at("worse");
  lowered_ = json.at("lowered");
  since_lowered_ = json.at("since_lowered");
  written_step_ = step_;
  if (step_ > 0) best_ = ReadParameters(FileOf(folder, step_), at::kFloat);
}

}  // namespace routecast
