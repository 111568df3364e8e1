// Expert ids of the rows that a token may look at, as vectors: what `interlayer`, `moe`
// and `autoregressive` begin with, and the place of mixup and noise. M members
// (speculation_layers.h), B sequences, T tokens, R rows a token, E experts, D width.
#pragma once

#include <vector>

#include "models/expert_slots.h"
#include "models/speculation_config.h"
#include "models/speculation_layers.h"
#include "models/token_inputs.h"

namespace routecast {

struct ExpertEmbedding {
  ExpertEmbedding(ParameterMaker* make, const SpeculationConfig& config);
  // [M * B,T * R,D]. Models of several experts a token see all of them. Where the slots
  // hold fewer layers than the context, rows are those that the whole would have.
  // `first_token`: tokens of the sequence before the window's, whose places are taken.
  at::Tensor operator()(const ExpertSlots& slots, const RoutingWindow& window,
                        KeyedDropout* dropout, int64_t first_token = 0) const;
  // What naming the hidden experts (TrainingHints) costs, by what became of their rows:
  // [M], summed over them. x_BND as operator() gives it, N = T * R.
  at::Tensor HiddenIdLoss(const at::Tensor& x_BND, const RoutingWindow& window) const;
  // A vector an expert [M * E,D], without the row of unknown ones.
  at::Tensor Keys() const;

  int context;
  int64_t width;
  EmbeddingLayer expert;               // E + 1 rows; the last one is padding
  EmbeddingLayer slot;                 // own layers, then the previous token's
  EmbeddingLayer stack, source;        // ours: the model knows what it predicts from
  std::vector<EmbeddingLayer> others;  // of a token's further choices; one or none
  TokenInputs inputs;
};

}  // namespace routecast
