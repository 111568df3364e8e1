// Incremental decoding in memory of fixed shapes, nothing of which depends on the host:
// experts are looked up on the device, keys and values have a place for every position.
// So on a GPU a step is one CUDA graph where every expert is there and stays; where
// experts come and go it is a graph from each choice of a layer's experts to the next
// one's (step_graph.h), between which the host reads the choice, leases the experts and
// writes where they lie into the layer's table. The same numbers as SwitchModel::Decode
// with a DecoderCache, but for sums of other lengths; the same bits whichever experts
// have to come.
// Shape letters: R rows, S source tokens, L positions, V vocabulary, D model width.
#pragma once

#include <memory>
#include <vector>

#include "models/slot_table.h"
#include "models/step_graph.h"
#include "models/switch_model.h"

namespace routecast {

// Thread rule: one thread at a time. Borrows the model.
class StaticDecoder {
 public:
  // Whether it can stand in for `model`: every expert is there (the executor has tables),
  // or can be leased (it has a source); few enough rows; nothing in `options` must happen
  // between layers where there is no between (an override, but with leases; jitter).
  static bool Serves(const SwitchModel& model, const ForwardOptions& options,
                     int64_t rows);

  // Memory for sequences of `rows` rows, at most num_source source tokens and
  // num_positions steps; Begin comes next. REQUIRES Serves().
  StaticDecoder(SwitchModel* model, int64_t rows, int64_t num_source,
                int64_t num_positions, const ForwardOptions& options);
  // For one sequence a row, which it begins.
  StaticDecoder(SwitchModel* model, const at::Tensor& encoded_RSD,
                const at::Tensor& valid_RS, int64_t num_positions,
                const ForwardOptions& options);

  // New sequences in the same memory: what is recorded stays. encoded [R,S,D] on the
  // model's device, valid bool [R,S]. REQUIRES Serves(), and ignore_padding as in the
  // constructor. Throws std::logic_error where the shapes do not fit.
  void Begin(const at::Tensor& encoded_RSD, const at::Tensor& valid_RS,
             const ForwardOptions& options);
  // ids int64 and live bool [R,1] on the CPU -> logits [R,V] in the model's dtype, on its
  // device, valid until the next step. The observer hears of every layer after the last
  // has run; with leases, as Decode tells it. Throws std::logic_error where no position
  // is left, or a step has thrown and nothing was begun since; what the source throws.
  at::Tensor Step(const at::Tensor& ids_R1, const at::Tensor& live_R1);
  // Row r goes on from what was row source_R[r] (int64, on the model's device).
  void Reorder(const at::Tensor& source_R);
  bool recorded() const { return graph_.recorded(); }
  // Of the device, while nothing runs: keys and values, tables, and what recordings keep.
  uint64_t memory_bytes() const;
  // Tables that were sent to the device so far.
  int64_t tables_sent() const;

 private:
  struct Memory {  // of a block; [R,H,L,d_kv] and [R,H,S,d_kv]
    at::Tensor self_key, self_value, cross_key, cross_value;
  };
  struct MoeLayer {
    size_t block = 0;
    LayerRouting routing;  // of the step
    // Of the step: each row's expert and place among the outputs; -1: to no expert.
    at::Tensor experts_R, place_R;
    std::unique_ptr<SlotTable> slots;  // with leases
  };
  static bool HasTables(const SwitchModel& model);
  void RunWhole(PassInfo pass);
  void RunParts(PassInfo pass);
  // With leases part p of a step ends with layer p's choice, the last but one with the
  // stack's output; the head, behind what observers are told, is the last. Without, one
  // part is all.
  void Compute(size_t part);
  void RunHead();
  at::Tensor SelfBias() const;
  at::Tensor AddAttention(size_t block, at::Tensor hidden) const;
  void Choose(MoeLayer* layer, const at::Tensor& normed);
  void ForceChoice(MoeLayer* layer);
  void Place(MoeLayer* layer) const;
  at::Tensor AddExperts(const MoeLayer& layer, const at::Tensor& hidden) const;
  std::vector<ExpertLease> Lease(MoeLayer* layer, const at::Tensor& experts_R);
  void RunExperts(const MoeLayer& layer) const;
  at::Tensor Counted() const;

  SwitchModel* model_;
  ExpertSource* source_;  // of leases; null where every expert is there
  ForwardOptions options_;
  int64_t rows_, num_source_, num_positions_, steps_ = 0;
  bool ready_ = false;
  StepGraph graph_;  // before what it made: its memory goes back when nothing lies there
  at::Tensor ids_R1_, live_R1_, position_, keys_L_, distance_bias_LH_, cross_bias_;
  at::Tensor row_R_;  // int32: each row's own number
  std::vector<Memory> memory_;
  std::vector<MoeLayer> layers_;
  at::Tensor hidden_R1D_, self_bias_;  // of the step, from part to part
  at::Tensor expert_outputs_RD_, output_R1D_, logits_RV_;  // of the step
};

}  // namespace routecast
