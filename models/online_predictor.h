// A predictor that adapts while it serves a decoder: every answer is held against the
// routing that then came (OnlineBias). Thread rule: one thread at a time.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "models/expert_predictor.h"
#include "models/online_bias.h"

namespace routecast {

class OnlinePredictor final : public ExpertPredictor {
 public:
  OnlinePredictor(std::unique_ptr<ExpertPredictor> inner, double rate)
      : inner_(std::move(inner)), bias_(rate) {}
  std::string name() const override { return inner_->name() + " online"; }
  bool needs_hidden() const override { return inner_->needs_hidden(); }
  bool needs_token_ids() const override { return inner_->needs_token_ids(); }
  // The last layer's truth may come with the next token.
  int history_tokens() const override { return std::max(2, inner_->history_tokens()); }
  bool keeps_tokens() const override { return inner_->keeps_tokens(); }
  void PrepareServing() override { inner_->PrepareServing(); }
  std::optional<at::Tensor> LaterUse() const override { return inner_->LaterUse(); }
  // What the biases are by now; nothing is learnt from whole windows.
  std::optional<at::Tensor> Predict(const RoutingWindow& window, int lead) override;
  // Serving: REQUIRES calls in the order of the pass, the same sequences in the same rows
  // from call to call. Rows that change are seen by their number alone, and what was open
  // is forgotten.
  std::vector<std::optional<at::Tensor>> PredictLast(const RoutingWindow& window,
                                                     int num_leads) override;

  // How many answers wait for their truth.
  size_t open_answers() const { return open_.size(); }

 private:
  // An answer whose truth has not come yet.
  struct Open {
    Stack stack;
    int source_layer, lead;
    int64_t token, target_visit;  // places in the sequence: of tokens, of their layers
    at::Tensor probs_BE;
  };
  void LearnFrom(const RoutingWindow& window);

  std::unique_ptr<ExpertPredictor> inner_;
  OnlineBias bias_;
  std::vector<Open> open_;
  int64_t newest_ = -1;  // token of the newest question
};

}  // namespace routecast
