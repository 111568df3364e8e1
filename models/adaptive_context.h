// As little context as an answer needs: a model of expert ids looks at the newest layer
// alone, then at one more, until it is confident or has no more. Meant for models that
// were trained with contexts of random length (--augment_context).
// Thread rule: one thread at a time.
#pragma once

#include <memory>
#include <vector>

#include "models/predictor_factory.h"

namespace routecast {

class AdaptiveContextPredictor final : public ExpertPredictor {
 public:
  // Confident: the likeliest expert of the next lead is used with `threshold` or more, by
  // the probabilities as they are calibrated (on the whole context). Throws UsageError
  // where the model does not embed experts (SpeculationKind).
  AdaptiveContextPredictor(std::unique_ptr<LearnedPredictor> inner, double threshold);
  std::string name() const override { return inner_->name() + " adaptive"; }
  bool needs_hidden() const override { return inner_->needs_hidden(); }
  bool needs_token_ids() const override { return inner_->needs_token_ids(); }
  int history_tokens() const override { return inner_->history_tokens(); }
  bool keeps_tokens() const override { return inner_->keeps_tokens(); }
  void PrepareServing() override { inner_->PrepareServing(); }
  // Each token by its own confidence: the others of its batch do not matter to it.
  std::optional<at::Tensor> Predict(const RoutingWindow& window, int lead) override;
  std::vector<std::optional<at::Tensor>> PredictLeads(const RoutingWindow& window,
                                                      int num_leads) override;
  std::vector<std::optional<at::Tensor>> PredictLast(const RoutingWindow& window,
                                                     int num_leads) override;
  // Questions to the model so far, and layers that they looked at.
  int64_t questions() const { return questions_; }
  int64_t layers_seen() const { return layers_seen_; }

 private:
  using Answers = std::vector<std::optional<at::Tensor>>;
  template <typename Ask>
  Answers Grow(RoutingWindow window, const Ask& ask);

  std::unique_ptr<LearnedPredictor> inner_;
  double threshold_;
  int context_;
  int64_t questions_ = 0, layers_seen_ = 0;
};

}  // namespace routecast
