// Listens to the model and keeps what it routed, row by row: a batch becomes traces. What
// lies on a GPU leaves it through a CopyRing while the pass goes on.
// B sequences, T tokens of a pass, E experts, D model width, K top-k.
#pragma once

#include <functional>
#include <vector>

#include "collector/copy_ring.h"
#include "common/routing.h"
#include "models/routing_observer.h"

namespace routecast {

struct RecordOptions {
  bool probs = true;
  int top_k = 0;           // 0 = not recorded
  bool output = false;     // the decoder's, of the rows with router inputs
  bool attention = false;  // summaries, of the rows with router inputs
  // Rows whose real tokens have router probabilities that are no numbers are marked, not
  // refused.
  bool mark_no_numbers = false;
};

// Thread rule: the forward thread. One batch at a time; several passes of a stack
// (incremental decoding) are joined along tokens. Padding is never recorded. DataError
// (in a pass or in Take) where a real token's router probabilities are no numbers,
// unless such rows are to be marked.
class RoutingRecorder final : public RoutingObserver {
 public:
  // hidden_rows[b]: record the router inputs of row b. `ring_bytes`, `copier`: of the
  // CopyRing.
  RoutingRecorder(const MoeGeometry& geometry, const RecordOptions& options,
                  std::vector<bool> hidden_rows, int64_t ring_bytes = CopyRing::kBytes,
                  HostCopier* copier = DeviceCopier());
  void OnPassBegin(const PassInfo& pass) override;
  void OnRouting(const LayerRouting& routing) override;
  bool WantsAttention() const override;
  void OnAttention(const LayerAttention& attention) override;
  void OnPassEnd(const PassInfo& pass) override;

  // The row's span in that stack, planes layer-major. Call once a row and stack, at the
  // end: waits for what is on its way. EnvironmentError where the device lost it.
  RoutingSpan Take(Stack stack, int row);
  // Whether the row was marked, in any pass. Waits as Take.
  bool NoNumbers(int row);

 private:
  struct Attended {  // [T,H] and [T,H,kStrongestKeys]
    std::vector<float> entropy;
    std::vector<uint16_t> keys;
  };
  struct LayerRecord {     // of one row and layer, in token order
    Attended attended[2];  // self-attention, cross-attention
    std::vector<uint16_t> ids, topk_ids, hidden;
    std::vector<uint8_t> dropped;
    std::vector<float> probs, margins, topk_probs;
  };
  struct RowRecord {
    std::vector<uint32_t> token_ids;
    std::vector<LayerRecord> layers;
    std::vector<uint16_t> output;
  };
  // Calls `use` with each row that is in hidden_rows and its part of `batch`, as `type`
  // and contiguous on the CPU: now, or when it has come.
  void ForHiddenRows(const at::Tensor& batch, at::ScalarType type,
                     const std::function<void(size_t row, const at::Tensor&)>& use);
  // The row's real tokens, as bf16 bits, of each of those rows.
  void RecordStates(const at::Tensor& states_BTD,
                    const std::function<std::vector<uint16_t>*(size_t row)>& to_of);
  void TakeAttention(Stack stack, const RowRecord& record, RoutingSpan* span) const;

  MoeGeometry geometry_;
  RecordOptions options_;
  std::vector<bool> hidden_rows_, no_numbers_;
  std::vector<RowRecord> rows_[2];
  std::vector<int64_t> hidden_places_;  // the rows that are in hidden_rows_
  at::Tensor hidden_index_;             // the same, where the batch is; once needed
  int64_t num_heads_ = 0;               // of an attention, once one was seen
  at::Tensor valid_BT_;                 // of the pass
  CopyRing ring_;
};

}  // namespace routecast
