#include "models/adaptive_context.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "common/errors.h"

namespace routecast {

AdaptiveContextPredictor::AdaptiveContextPredictor(
    std::unique_ptr<LearnedPredictor> inner, double threshold)
    : inner_(std::move(inner)),
      threshold_(threshold),
      context_(inner_->config().context) {
  if (KindOf(inner_->config().kind).embeds_experts) return;
  throw UsageError(ErrorText("adaptive_context: needs a model that embeds experts",
                             inner_->config().kind + " does not",
                             "name a run of --kind=interlayer"));
}

template <typename Ask>
AdaptiveContextPredictor::Answers AdaptiveContextPredictor::Grow(RoutingWindow window,
                                                                 const Ask& ask) {
  Answers answers;
  at::Tensor open;  // [B,T,1]: tokens that no answer was confident about yet
  // No more layers are known than there are; in a decoder the token before has them all.
  const int known =
      window.stack == Stack::kEncoder ? window.source_layer + 1 : window.num_layers;
  const int most = std::clamp(known, 1, context_);
  for (int layers = 1; layers <= most; ++layers) {
    window.context_layers = layers;
    Answers more = ask(window);
    ++questions_;
    layers_seen_ += layers;
    const bool any = !more.empty() && more[0].has_value();
    at::Tensor unsure;
    if (any) {
      const int64_t tokens = more[0]->size(1), all = window.valid_BT.size(1);
      unsure =
          more[0]
              ->amax(-1, true)
              .lt(threshold_ / inner_->config().geometry.experts_per_token)
              .logical_and(window.valid_BT.narrow(1, all - tokens, tokens).unsqueeze(2));
    }
    if (layers == 1) {
      answers = std::move(more);
      open = unsure;
    } else {
      for (size_t i = 0; i < answers.size(); ++i) {
        if (answers[i]) answers[i] = at::where(open, *more[i], *answers[i]);
      }
      open = open.logical_and(unsure);
    }
    if (!any || !open.any().item<bool>()) break;
  }
  return answers;
}

std::optional<at::Tensor> AdaptiveContextPredictor::Predict(const RoutingWindow& window,
                                                            int lead) {
  auto all = PredictLeads(window, lead);
  return all.empty() ? std::nullopt : std::move(all.back());
}

std::vector<std::optional<at::Tensor>> AdaptiveContextPredictor::PredictLeads(
    const RoutingWindow& window, int num_leads) {
  return Grow(window,
              [&](const RoutingWindow& w) { return inner_->PredictLeads(w, num_leads); });
}

std::vector<std::optional<at::Tensor>> AdaptiveContextPredictor::PredictLast(
    const RoutingWindow& window, int num_leads) {
  return Grow(window,
              [&](const RoutingWindow& w) { return inner_->PredictLast(w, num_leads); });
}

}  // namespace routecast
