// Incremental decoding in memory of fixed shapes, nothing of which depends on the host:
// experts are looked up on the device, keys and values have a place for every position.
// So on a GPU a step is one CUDA graph (step_graph.h). The same numbers as
// SwitchModel::Decode with a DecoderCache, but for sums of other lengths.
// Shape letters: R rows, S source tokens, L positions, V vocabulary, D model width.
#pragma once

#include <vector>

#include "models/step_graph.h"
#include "models/switch_model.h"

namespace routecast {

// Thread rule: one thread at a time. Borrows the model.
class StaticDecoder {
 public:
  // Whether it can stand in for `model`: every expert is there (the executor has tables),
  // few enough rows, and nothing in `options` must happen between layers (an override,
  // jitter).
  static bool Serves(const SwitchModel& model, const ForwardOptions& options,
                     int64_t rows);

  // encoded [R,S,D] on the model's device, valid bool [R,S]. At most `num_positions`
  // steps. REQUIRES Serves().
  StaticDecoder(SwitchModel* model, const at::Tensor& encoded_RSD,
                const at::Tensor& valid_RS, int64_t num_positions,
                const ForwardOptions& options);

  // ids int64 and live bool [R,1] on the CPU -> logits [R,V] in the model's dtype, on its
  // device, valid until the next step. The observer hears of every layer after the last
  // has run. Throws std::logic_error where no position is left.
  at::Tensor Step(const at::Tensor& ids_R1, const at::Tensor& live_R1);
  // Row r goes on from what was row source_R[r] (int64, on the model's device).
  void Reorder(const at::Tensor& source_R);
  bool recorded() const { return graph_.recorded(); }

 private:
  struct Memory {  // of a block; [R,H,L,d_kv] and [R,H,S,d_kv]
    at::Tensor self_key, self_value, cross_key, cross_value;
  };
  void Compute();
  at::Tensor SelfBias() const;
  at::Tensor AddFeedForward(const SwitchModel::Block& block, const at::Tensor& hidden);
  at::Tensor AddSparse(const SwitchModel::Block& block, const at::Tensor& hidden,
                       const at::Tensor& normed);

  SwitchModel* model_;
  ForwardOptions options_;
  int64_t rows_, num_positions_, steps_ = 0;
  at::Tensor ids_R1_, live_R1_, position_, keys_L_, distance_bias_LH_, cross_bias_;
  at::Tensor row_R_;  // int32: each row's own number
  std::vector<Memory> memory_;
  std::vector<LayerRouting> routings_;  // of the step, for the observer
  at::Tensor output_RTD_, logits_RV_;   // of the step
  StepGraph graph_;
};

}  // namespace routecast
