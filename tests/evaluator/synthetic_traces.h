// Traces whose hidden states carry a noisy view of the experts ahead, and the predictor
// that reads it: a predictor of known accuracy for tests and benchmarks. View of lead d
// at layer l: z_e = N(0,1) + signal * [e is right]; softmax(signal * z) is the exact
// posterior, so the predictor is calibrated.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

#include "common/random.h"
#include "common/routing.h"
#include "models/expert_predictor.h"

namespace routecast {

struct SyntheticTraceOptions {
  MoeGeometry geometry{2, 2, 16, 1, 0};
  int tokens = 16, source_tokens = 24;
  double repeat = 0.15;  // chance that a layer repeats an expert of the last three tokens
  double signal = 4;     // of lead 1; falls by a factor of 0.85 a lead
  int leads = 2;
};

inline RoutingSpan SyntheticSpan(const SyntheticTraceOptions& o, Stack stack, int tokens,
                                 uint64_t seed) {
  const int layers = o.geometry.layers(stack), experts = o.geometry.num_experts;
  RoutingSpan span;
  span.num_tokens = tokens;
  span.num_layers = layers;
  span.hidden_width = experts * o.leads;
  span.expert_ids.resize(static_cast<size_t>(layers * tokens));
  span.gate_probs.assign(span.expert_ids.size(), 0.5f);
  span.hidden.resize(span.expert_ids.size() * static_cast<size_t>(span.hidden_width));
  const auto id = [&](int l, int t) -> uint16_t& {
    return span.expert_ids[static_cast<size_t>(l * tokens + t)];
  };
  for (int t = 0; t < tokens; ++t) {
    span.token_ids.push_back(static_cast<uint32_t>(3 + ToRange(Mix(seed, t), 400)));
    for (int l = 0; l < layers; ++l) {
      const uint64_t draw = Mix(seed, t, l, 11);
      id(l, t) = t > 2 && ToUnit(draw) < o.repeat
                     ? id(l, t - 1 - static_cast<int>(ToRange(Mix(draw), 3)))
                     : static_cast<uint16_t>(ToRange(Mix(draw, 1), experts));
    }
  }
  for (int l = 0; l < layers; ++l) {
    for (int t = 0; t < tokens; ++t) {
      for (int lead = 1; lead <= o.leads; ++lead) {
        int target = l + lead, token = t;
        if (target >= layers) {
          target -= layers;
          token = std::min(t + 1, tokens - 1);
        }
        const double signal = o.signal * std::pow(0.85, lead - 1);
        for (int e = 0; e < experts; ++e) {
          const double z = ToNormal(Mix(seed, l, t, lead * 1000 + e)) +
                           (target < layers && id(target, token) == e ? signal : 0);
          const size_t at = static_cast<size_t>((l * tokens + t) * span.hidden_width +
                                                (lead - 1) * experts + e);
          span.hidden[at] = FloatToBf16(static_cast<float>(z));
        }
      }
    }
  }
  return span;
}

inline std::vector<RoutingTrace> SyntheticTraces(const SyntheticTraceOptions& options,
                                                 int count, uint64_t seed) {
  std::vector<RoutingTrace> traces;
  for (int i = 0; i < count; ++i) {
    RoutingTrace trace;
    trace.sequence_id = static_cast<uint64_t>(i);
    trace.encoder =
        SyntheticSpan(options, Stack::kEncoder, options.source_tokens, Mix(seed, i, 0));
    trace.decoder =
        SyntheticSpan(options, Stack::kDecoder, options.tokens, Mix(seed, i, 1));
    traces.push_back(std::move(trace));
  }
  return traces;
}

class SignalPredictor : public ExpertPredictor {
 public:
  explicit SignalPredictor(const SyntheticTraceOptions& options) : options_(options) {}
  std::string name() const override { return "signal"; }
  bool needs_hidden() const override { return true; }
  int history_tokens() const override { return 1; }
  std::optional<at::Tensor> Predict(const RoutingWindow& window, int lead) override {
    if (!window.hidden_BTD.defined() || lead > options_.leads) return std::nullopt;
    const double signal = options_.signal * std::pow(0.85, lead - 1);
    const int64_t experts = window.num_experts;
    return at::softmax(
        window.hidden_BTD.narrow(2, (lead - 1) * experts, experts) * signal, -1);
  }

 private:
  SyntheticTraceOptions options_;
};

}  // namespace routecast
