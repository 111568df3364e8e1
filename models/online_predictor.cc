#include "models/online_predictor.h"

#include <ATen/ATen.h>

#include <algorithm>

namespace routecast {

std::optional<at::Tensor> OnlinePredictor::Predict(const RoutingWindow& window,
                                                   int lead) {
  auto probs = inner_->Predict(window, lead);
  if (!probs) return probs;
  return bias_.Apply(window.stack, window.source_layer, lead, *probs);
}

namespace {

// Choices [B,K] of a layer at a token of the window; -100 where they are not known.
at::Tensor ChosenAt(const RoutingWindow& window, int64_t token, int64_t layer) {
  auto chosen = window.experts_BTL.select(1, token).select(1, layer).unsqueeze(1);
  if (window.others_BTLK.defined()) {
    const auto others = window.others_BTLK.select(1, token).select(1, layer);
    chosen = at::cat({chosen, others}, 1);
  }
  return at::where(chosen.lt(window.num_experts), chosen, -100).cpu();
}

}  // namespace

// The newest routing of a window is that of its source layer at its last token; before
// any layer, that of the last layer at the token before.
void OnlinePredictor::LearnFrom(const RoutingWindow& window) {
  const int64_t B = window.experts_BTL.size(0), T = window.experts_BTL.size(1);
  const int64_t newest = window.first_token + T - 1;
  if (newest < newest_) open_.clear();  // another sequence
  newest_ = newest;
  // An answer to this very question was about another guess of the token.
  std::erase_if(open_, [&](const Open& open) {
    return open.stack != window.stack ||
           (open.source_layer == window.source_layer && open.token == newest);
  });
  const bool before = window.source_layer < 0;
  const int64_t layer = before ? window.num_layers - 1 : window.source_layer;
  const int64_t visit = (newest - before) * window.num_layers + layer;
  if (T > before && layer >= 0) {
    const at::Tensor chosen = ChosenAt(window, T - 1 - before, layer);
    for (const Open& open : open_) {
      if (open.target_visit != visit || open.probs_BE.size(0) != B) continue;
      bias_.Learn(open.stack, open.source_layer, open.lead, open.probs_BE, chosen);
    }
  }
  std::erase_if(open_, [&](const Open& open) { return open.target_visit <= visit; });
}

std::vector<std::optional<at::Tensor>> OnlinePredictor::PredictLast(
    const RoutingWindow& window, int num_leads) {
  LearnFrom(window);
  auto all = inner_->PredictLast(window, num_leads);
  for (size_t i = 0; i < all.size(); ++i) {
    if (!all[i]) continue;
    const int lead = static_cast<int>(i) + 1;
    all[i] = bias_.Apply(window.stack, window.source_layer, lead, *all[i]);
    open_.push_back({window.stack, window.source_layer, lead, newest_,
                     newest_ * window.num_layers + window.source_layer + lead,
                     all[i]->select(1, all[i]->size(1) - 1).cpu()});
  }
  return all;
}

}  // namespace routecast
