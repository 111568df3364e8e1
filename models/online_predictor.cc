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

// The newest routing of a window is that of its source layer at its last token.
void OnlinePredictor::LearnFrom(const RoutingWindow& window) {
  if (window.source_layer < 0) return;
  const int64_t B = window.experts_BTL.size(0), T = window.experts_BTL.size(1);
  auto chosen = window.experts_BTL.select(1, T - 1).select(1, window.source_layer);
  chosen = chosen.unsqueeze(1);  // [B,K]
  if (window.others_BTLK.defined()) {
    const auto others =
        window.others_BTLK.select(1, T - 1).select(1, window.source_layer);
    chosen = at::cat({chosen, others}, 1);
  }
  chosen = at::where(chosen.lt(window.num_experts), chosen, -100).cpu();
  for (const Open& open : open_) {
    if (open.stack != window.stack || open.target != window.source_layer) continue;
    if (open.probs_BE.size(0) != B) continue;
    bias_.Learn(open.stack, open.source_layer, open.lead, open.probs_BE, chosen);
  }
  std::erase_if(open_, [&](const Open& open) {
    return open.stack != window.stack || open.target == window.source_layer;
  });
}

std::vector<std::optional<at::Tensor>> OnlinePredictor::PredictLast(
    const RoutingWindow& window, int num_leads) {
  LearnFrom(window);
  auto all = inner_->PredictLast(window, num_leads);
  for (size_t i = 0; i < all.size(); ++i) {
    if (!all[i]) continue;
    const int lead = static_cast<int>(i) + 1;
    all[i] = bias_.Apply(window.stack, window.source_layer, lead, *all[i]);
    const int target = (window.source_layer + lead) % std::max(1, window.num_layers);
    open_.push_back({window.stack, window.source_layer, lead, target,
                     all[i]->select(1, all[i]->size(1) - 1).cpu()});
  }
  return all;
}

}  // namespace routecast
