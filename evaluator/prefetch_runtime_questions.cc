// What the runtime asks its foresight, and what becomes of the answers.
#include <ATen/ATen.h>

#include <utility>

#include "evaluator/prefetch_runtime.h"

namespace routecast {

bool PrefetchRuntime::Speculating() const {
  if (!foresight_ || !options_.planner.policy.speculate || !following_) return false;
  return !options_.planner.policy.auto_off ||
         gauges_[static_cast<int>(stack_)].Speculate();
}

bool PrefetchRuntime::AnyGaugeNeedsPredictor() const {
  if (!options_.planner.policy.auto_off) return true;
  return (runs_[0] && gauges_[0].needs_predictor()) ||
         (runs_[1] && gauges_[1].needs_predictor());
}

void PrefetchRuntime::Ask(const char* what,
                          std::function<std::vector<LayerForecast>()> question,
                          std::function<void()> news) {
  const double from = clock_.Now();
  long visit = 0, epoch = 0;
  {
    std::lock_guard lock(mutex_);
    visit = planner_.timeline().visit();
    epoch = epoch_;
  }
  auto answer = [this, what, visit, epoch, question = std::move(question)] {
    const double asked = clock_.Now();
    std::vector<LayerForecast> forecasts;
    questions_.Run([&] { forecasts = question(); });
    const double answered = clock_.Now();
    if (timeline_ && !forecasts.empty())
      timeline_->Span(Timeline::Track::kPredictor, what, asked, answered);
    std::lock_guard lock(mutex_);
    // Not thread_: the runtime's end takes it away under the last answer.
    if (options_.ask_aside) aside_ += answered - asked;
    Foresee(forecasts, visit, epoch);
  };
  if (thread_) {
    auto instead = [this, news = std::move(news)] {
      if (news) questions_.Run(news);
    };
    thread_->Ask(std::move(answer), std::move(instead));
  } else {
    answer();
  }
  predict_ += clock_.Now() - from;
}

void PrefetchRuntime::Tell(std::function<void()> news) {
  if (!thread_) return (void)questions_.Run(news);
  thread_->Tell([this, news = std::move(news)] { questions_.Run(news); });
}

// Tensors are valid during the call only: what is asked later has its own.
PassInfo PrefetchRuntime::Kept(const PassInfo& pass) const {
  if (!thread_) return pass;
  PassInfo kept = pass;
  kept.token_ids_BT = pass.token_ids_BT.clone();
  kept.valid_BT = pass.valid_BT.clone();
  if (pass.output_BTD.defined())
    kept.output_BTD = pass.output_BTD.to(at::kCPU, at::kFloat, false, /*copy=*/true);
  return kept;
}

LayerRouting PrefetchRuntime::Kept(const LayerRouting& routing) const {
  if (!thread_) return routing;
  LayerRouting kept;
  kept.layer = routing.layer;
  kept.expert_ids_BT = routing.expert_ids_BT.to(at::kCPU, at::kLong, false, true);
  if (routing.other_ids_BTK.defined())
    kept.other_ids_BTK = routing.other_ids_BTK.to(at::kCPU, at::kLong, false, true);
  if (routing.input_BTD.defined())
    kept.input_BTD = routing.input_BTD.to(at::kCPU, at::kFloat, false, true);
  return kept;
}

void PrefetchRuntime::ForgetPredictions() {
  planner_.ForgetPredictions();
  ++epoch_;
}

void PrefetchRuntime::Foresee(const std::vector<LayerForecast>& forecasts, long visit,
                              long epoch) {
  if (forecasts.empty() || epoch != epoch_ || !active_) return;
  const long passed = planner_.timeline().visit() - visit;
  for (const LayerForecast& forecast : forecasts) {
    if (forecast.distance == LayerForecast::kLater) {
      planner_.PredictLater(forecast.layer, forecast.probabilities);
      continue;
    }
    const auto distance = static_cast<int>(forecast.distance - passed);
    if (distance >= 1)  // else it has begun meanwhile
      planner_.Predict(forecast.layer, distance, forecast.probabilities);
  }
  Act();
}

}  // namespace routecast
