// A predictor that says whatever `mode` wants, at every layer and lead.
#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <chrono>
#include <limits>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "models/expert_predictor.h"

namespace routecast {

class StrangePredictor : public ExpertPredictor {
 public:
  enum Mode {
    kRandom,
    kMalicious,
    kSlow,
    kWriting,      // into what it is shown
    kThrowing,     // every third time
    kThrowingInt,  // always, and no exception
    kNan,
    kTooLikely,  // numbers above 1
    kMisshapen
  };
  static constexpr int kModes = kMisshapen + 1;
  explicit StrangePredictor(Mode mode) : mode_(mode) {}
  static bool Fails(Mode mode) { return mode >= kThrowing; }
  static bool Answers(Mode mode) { return mode <= kThrowing; }  // at least at times
  // How what is said of its first failure begins.
  static std::string FailureOf(Mode mode) {
    const char* kWords[] = {"no idea", "something that is no exception",
                            "an answer with nan as", "an answer with 7.000000 as",
                            "an answer of shape ["};
    return Fails(mode) ? kWords[mode - kThrowing] : "";
  }
  std::string name() const override { return "strange"; }
  bool needs_hidden() const override { return mode_ == kRandom || mode_ == kWriting; }
  int history_tokens() const override { return mode_ == kRandom ? 4 : 1; }
  std::optional<at::Tensor> Predict(const RoutingWindow& window, int) override {
    ++calls;
    if (window.hidden_BTD.defined()) {
      EXPECT_EQ(window.hidden_BTD.size(1), window.token_ids_BT.size(1));
    }
    const int64_t b = window.token_ids_BT.size(0), t = window.token_ids_BT.size(1);
    EXPECT_LE(window.stack == Stack::kDecoder ? t : 0, 4);
    at::Tensor p = at::zeros({b, t, window.num_experts});
    switch (mode_) {
      case kRandom:
        p.uniform_(0, 1);
        break;
      case kMalicious: {  // certain of what was not chosen lately
        p.fill_(1);
        const at::Tensor last =
            window.experts_BTL.slice(1, t - 1).clamp_max(window.num_experts - 1);
        p.slice(1, t - 1).scatter_(2, last, 0);
        break;
      }
      case kSlow:
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        p.fill_(0.5);
        break;
      case kWriting:
        p.fill_(0.5);
        for (const at::Tensor* seen :
             {&window.token_ids_BT, &window.valid_BT, &window.experts_BTL,
              &window.hidden_BTD, &window.context_BTD, &window.source_BSD}) {
          if (seen->defined()) seen->zero_();
        }
        break;
      case kThrowing:
        if (calls % 3 == 0) throw std::runtime_error("no idea");
        p.fill_(0.7);
        break;
      case kThrowingInt:
        throw 42;
      case kNan:
        p.fill_(std::numeric_limits<float>::quiet_NaN());
        break;
      case kTooLikely:
        p.fill_(7);
        break;
      case kMisshapen:
        return Misshapen(b, t, window.num_experts);
    }
    return p;
  }
  int calls = 0;

 private:
  at::Tensor Misshapen(int64_t b, int64_t t, int64_t e) const {
    const std::vector<std::vector<int64_t>> sizes = {
        {b, t, e + 90}, {b, t, e - 1}, {b + 1, t, e}, {b, t + 2, e}, {b, t}};
    const auto which = static_cast<size_t>(calls) % (sizes.size() + 1);
    return which == sizes.size() ? at::Tensor() : at::ones(sizes[which]);
  }
  Mode mode_;
};

}  // namespace routecast
