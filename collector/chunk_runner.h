// Computes one chunk: documents -> tokens -> batches -> the model -> traces.
#pragma once

#include <functional>
#include <set>

#include "collector/chunk_plan.h"
#include "collector/routing_recorder.h"
#include "models/switch_model.h"
#include "storage/store_config.h"

namespace routecast {

// Borrows everything. Thread rule: the forward thread.
class ChunkRunner {
 public:
  // skip_nonfinite: a sequence for which the model's arithmetic gives no numbers, in its
  // routers or its logits, is handed on without tokens, for the store to know that it was
  // left out; else such a one is a DataError.
  ChunkRunner(SwitchModel* model, const Corpus* corpus, const Tokenizer* tokenizer,
              const ChunkPlan* plan, const StoreConfig& config, bool skip_nonfinite);
  // Hands each sequence of the chunk to `sink`. `goes_on` is called before every batch
  // and, in a pass, before the experts of every MoE layer, so that large models answer
  // soon; false abandons the chunk: Run then returns false. Batches are rows of like
  // length, a function of the chunk alone.
  bool Run(uint32_t chunk, const std::function<bool()>& goes_on,
           const std::function<void(const RoutingTrace&)>& sink);
  // Places of tokens in all passes so far, padding included.
  int64_t computed_tokens() const { return computed_tokens_; }

 private:
  struct Sequence {
    uint64_t id = 0, document = 0, group = 0;
    std::vector<int32_t> inputs, targets;  // targets empty for Task::kEncode
  };
  std::vector<Sequence> SequencesOf(const Chunk& chunk);
  const std::vector<std::vector<int32_t>>& SegmentsOf(uint64_t document);
  // Where the batch that begins at `first` ends: rows of like length, little padding.
  size_t BatchEnd(const std::vector<Sequence>& sequences, size_t first) const;
  Sequence MakeSequence(uint64_t id, std::vector<int32_t> ids) const;
  void RunBatch(const std::vector<const Sequence*>& batch,
                const std::function<bool()>& goes_on,
                const std::function<void(const RoutingTrace&)>& sink);
  bool RecordsHidden(uint64_t group) const;

  int64_t computed_tokens_ = 0;
  SwitchModel* model_;
  const Corpus* corpus_;
  const Tokenizer* tokenizer_;
  const ChunkPlan* plan_;
  StoreConfig config_;
  bool skip_nonfinite_;
  DocumentOrder order_;
  std::set<uint64_t> forced_groups_;
  // The document looked at last: slices of a long one follow each other.
  uint64_t segmented_document_ = ~uint64_t{0};
  std::vector<std::vector<int32_t>> segments_;
};

}  // namespace routecast
