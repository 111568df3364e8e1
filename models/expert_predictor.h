// Routing so far -> probabilities for experts ahead. Baselines and learned models behind
// one door, for the trainer's tables and the runtime alike.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "models/routing_window.h"

namespace routecast {

// Thread rule: one thread at a time. No training mode; no gradient.
class ExpertPredictor {
 public:
  virtual ~ExpertPredictor() = default;
  virtual std::string name() const = 0;
  // True where Predict needs window.hidden_BTD for source_layer >= 0.
  virtual bool needs_hidden() const = 0;
  // True where answers follow from the window's token ids.
  virtual bool needs_token_ids() const { return false; }
  // From here on speed matters more than the last bits
  // (SpeculationModel::PrepareServing).
  virtual void PrepareServing() {}
  // How many of the newest tokens of a decoder window matter (1 = the last token only);
  // the runtime keeps that much history.
  virtual int history_tokens() const = 0;
  // True where an answer costs less while the window begins with the same token as the
  // one before: then it may hold up to twice as many (KeptTokens).
  virtual bool keeps_tokens() const { return false; }
  // probs [B,T,E] float32 for the target at `lead` (routing_window.h), or nullopt where
  // this predictor has nothing to say for that (stack, source, lead). Rows of padding are
  // arbitrary. Where tokens take K experts, an expert's share of their K choices: summed
  // over the experts 1 all the same (UseProbability).
  virtual std::optional<at::Tensor> Predict(const RoutingWindow& window, int lead) = 0;
  // Leads 1..num_leads of one window, [lead - 1]; cheaper than Predict by lead where one
  // computation serves all.
  virtual std::vector<std::optional<at::Tensor>> PredictLeads(const RoutingWindow& window,
                                                              int num_leads) {
    std::vector<std::optional<at::Tensor>> all;
    for (int lead = 1; lead <= num_leads; ++lead) all.push_back(Predict(window, lead));
    return all;
  }
  // PredictLeads of the newest token alone, [B,1,E] a lead: what serving a decoder needs.
  virtual std::vector<std::optional<at::Tensor>> PredictLast(const RoutingWindow& window,
                                                             int num_leads) {
    auto all = PredictLeads(window, num_leads);
    for (auto& probs : all) {
      if (probs) probs = probs->slice(1, probs->size(1) - 1);
    }
    return all;
  }
  // What the newest PredictLast also said: of each decoder layer, the share of the visits
  // after the foretold ones that will use each expert, [B,L,E] float32 in [0, 1];
  // nullopt = nothing.
  virtual std::optional<at::Tensor> LaterUse() const { return std::nullopt; }
};

// The chance that a token takes an expert which has the share `p` of its K choices.
// Losses over K choices are least where p is 1/K of that chance (RoutingCrossEntropy),
// and so is a share of counts.
inline float UseProbability(float p, int experts_per_token) {
  return std::clamp(p * static_cast<float>(experts_per_token), 0.f, 1.f);
}

// How many of the `held` tokens of a decoder's window stay when `fresh` ones come.
inline int64_t KeptTokens(const ExpertPredictor& predictor, int64_t held, int64_t fresh) {
  const int64_t history = std::max(1, predictor.history_tokens());
  const int64_t most = predictor.keeps_tokens() ? 2 * history : history;
  if (held + fresh <= most) return held;
  return std::clamp<int64_t>(history - fresh, 0, held);
}

}  // namespace routecast
