#include "models/markov_prior.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "models/expert_slots.h"
#include "models/speculation_config.h"

namespace routecast {

MarkovPrior::MarkovPrior(ParameterMaker* make, Parameters* constants,
                         const MoeGeometry& geometry)
    : geometry_(geometry) {
  const int64_t rows = int64_t{geometry.num_layers()} * (geometry.num_experts + 1);
  const int64_t leads = std::max(geometry.encoder_layers, geometry.decoder_layers);
  table_ = at::zeros({rows, leads * geometry.num_experts});
  constants->Add("prior.markov", table_);
  gain_ = make->Constant("prior.gain", {geometry.num_layers()}, 1);
}

void MarkovPrior::Fit(const BaselineTables& tables) {
  const MoeGeometry& g = geometry_;
  at::Tensor log_probs = at::zeros(table_.sizes());  // on the CPU: written by hand
  std::vector<float> probs(static_cast<size_t>(g.num_experts));
  for (int layer = 0; layer < g.num_layers(); ++layer) {
    const Stack stack = g.StackOf(layer);
    const int source = g.LayerInStack(layer), leads = NumLeadsOf(g, stack, source);
    for (int expert = 0; expert < g.num_experts; ++expert) {
      float* row = log_probs.data_ptr<float>() +
                   (int64_t{layer} * (g.num_experts + 1) + expert) * log_probs.size(1);
      for (int lead = 1; lead <= leads; ++lead) {
        const int target = g.GlobalLayer(stack, (source + lead) % g.layers(stack));
        tables.Markov1(layer, lead, target, expert, probs.data());
        for (float p : probs) *row++ = std::log(p);
      }
    }
  }
  table_.copy_(log_probs);
}

at::Tensor MarkovPrior::AddTo(const at::Tensor& logits_BTHE,
                              const RoutingWindow& window) const {
  if (window.source_layer < 0) return logits_BTHE;
  return logits_BTHE + Mixed(Logits(window, logits_BTHE.size(2)), window.training);
}

at::Tensor MarkovPrior::Logits(const RoutingWindow& window, int64_t leads) const {
  const int64_t E = geometry_.num_experts;
  const int64_t M = gain_.dim() == 2 ? gain_.size(0) : 1;
  const int layer = geometry_.GlobalLayer(window.stack, window.source_layer);
  const auto first = window.experts_BTL.select(2, window.source_layer);
  const auto rows_of = [&](const at::Tensor& ids) {
    return at::embedding(table_, ids + layer * (E + 1)).narrow(-1, 0, leads * E);
  };
  at::Tensor logits = rows_of(first);
  if (window.others_BTLK.defined()) {  // the mean of the probabilities that each gives
    const auto others = window.others_BTLK.select(2, window.source_layer);
    const auto all = at::cat({logits.unsqueeze(2), rows_of(others)}, 2);
    logits = all.logsumexp(2) - std::log(static_cast<double>(all.size(2)));
  }
  const auto gain = gain_.select(-1, layer);
  return (logits.reshape({M, -1, leads * E}) * gain.view({M, 1, 1}))
      .view({first.size(0), first.size(1), leads, E});
}

}  // namespace routecast
