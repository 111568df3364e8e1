// Greedy decoding, step by step, for a batch of right-padded prompts.
#pragma once

#include <functional>
#include <vector>

#include "models/switch_model.h"

namespace routecast {

struct GenerationOptions {
  int max_new_tokens = 32;
  ForwardOptions forward;
  // Called after each step with the step's fp32 logits [B,V] and chosen ids [B] (both
  // CPU). Returns false to stop early (a requested stop). May be empty.
  std::function<bool(int step, const at::Tensor& logits_BV, const at::Tensor& ids_B)>
      on_step;
};

// One id list a row, ended by (and including) end-of-sequence where it came. Rows that
// ended go on as padding, marked invalid to observers, until all have ended.
std::vector<std::vector<int64_t>> GreedyDecode(SwitchModel* model,
                                               const at::Tensor& ids_BS,
                                               const at::Tensor& valid_BS,
                                               const GenerationOptions& options);

}  // namespace routecast
