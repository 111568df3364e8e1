// Predictors are foreign code: a question that one fails is counted and left out, in
// every mode alike. B sequences, T tokens, E experts.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "common/run_record.h"
#include "evaluator/foresight.h"
#include "models/routing_window.h"

namespace routecast {

// Thread rule: any thread.
class QuestionGuard {
 public:
  // Runs what a predictor may throw from. False where it did, whatever it threw.
  bool Run(const std::function<void()>& question);
  int64_t failed() const;
  std::string first_failure() const;  // its words; empty: none failed
  // Adds `failed_questions` and `first_failure` where a question failed.
  void AddTo(Json* json) const;

 private:
  mutable std::mutex mutex_;
  int64_t failed_ = 0;
  std::string first_;
};

// A foresight whose questions are guarded: one that fails says nothing. Both outlive it.
class GuardedForesight : public Foresight {
 public:
  GuardedForesight(Foresight* inner, QuestionGuard* guard)
      : inner_(inner), guard_(guard) {}
  std::string name() const override { return inner_->name(); }
  std::vector<LayerForecast> AtPassBegin(const PassInfo& pass) override {
    return Ask([&] { return inner_->AtPassBegin(pass); });
  }
  std::vector<LayerForecast> AtLayer(const LayerRouting& routing) override {
    return Ask([&] { return inner_->AtLayer(routing); });
  }
  std::vector<LayerForecast> AtPassEnd(const PassInfo& pass) override {
    return Ask([&] { return inner_->AtPassEnd(pass); });
  }
  void SkipPass(const PassInfo& pass) override {
    guard_->Run([&] { inner_->SkipPass(pass); });
  }
  void Skip(const LayerRouting& routing) override {
    guard_->Run([&] { inner_->Skip(routing); });
  }

 private:
  template <typename Question>
  std::vector<LayerForecast> Ask(const Question& question) {
    std::vector<LayerForecast> forecasts;
    guard_->Run([&] { forecasts = question(); });
    return forecasts;
  }
  Foresight* inner_;
  QuestionGuard* guard_;
};

// "NAME: N questions failed" and `consequence`, "the first with: ..."; for tables.
std::string FailureText(const std::string& predictor, int64_t failed,
                        const std::string& consequence, const std::string& first);

// Throws std::runtime_error where what was said about `window` is no answer: a tensor of
// another shape than [B, tokens, E], or a number that is no probability in the row of a
// token that counts. The rows are of the window's newest tokens.
void RequireAnswers(const std::vector<std::optional<at::Tensor>>& answers,
                    const RoutingWindow& window, int64_t tokens);

}  // namespace routecast
