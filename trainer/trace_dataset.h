// The traces of one store (or of memory) as training sees them: split by document group,
// read by index, kept in memory where they fit.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "common/run_record.h"
#include "storage/trace_reader.h"
#include "trainer/window_sampler.h"

namespace routecast {

struct TraceDatasetOptions {
  // Records that are kept in memory once read; what does not fit is read each time it is
  // needed. Per rank.
  uint64_t cache_bytes = uint64_t{1} << 30;
  bool keep_top_k = false;  // the routers' top-k, where recorded: what distillation and
                            // backup experts need
};

// Thread rule: Read from any thread at once, all else from one thread. `uint32_t`
// sequences are indices into sequences().
class TraceDataset {
 public:
  // Throws UsageError where the store has no sequence, and what TraceReader throws.
  TraceDataset(std::shared_ptr<const TraceReader> reader, TraceDatasetOptions options);
  // Of traces in memory.
  TraceDataset(std::vector<RoutingTrace> traces, MoeGeometry geometry,
               TraceDatasetOptions options = {});

  const MoeGeometry& geometry() const { return geometry_; }
  const std::vector<SequenceInfo>& sequences() const { return sequences_; }
  SplitPart part(uint32_t sequence) const { return parts_[sequence]; }
  uint32_t length(uint32_t sequence, Stack stack) const;
  bool any_hidden() const;
  bool keeps_top_k() const { return options_.keep_top_k; }
  // Choices of the router that every token's record holds; 0 = none.
  int top_k() const;
  // The router's top-k is kept, with its probabilities. Reads a record.
  bool has_teacher();
  // Heads of the traced model's attention whose summaries lie beside all router inputs; 0
  // = none do.
  int attention_heads() const;
  // The largest token id of the store plus one: the smallest vocabulary that covers it; 0
  // where no ids are recorded. Reads every record, once.
  int64_t vocab_size();

  // In the order asked. Router inputs and attention are there where asked for and
  // recorded; they may be there where not asked for.
  std::vector<std::shared_ptr<const RoutingTrace>> Read(
      std::span<const uint32_t> sequences, WithHidden with_hidden);

  // Memory that the part's records take once they are kept: from a sample of them, by
  // their tokens. Of traces in memory 0.
  uint64_t EstimateBytes(SplitPart part, WithHidden with_hidden);
  bool FitsInCache(SplitPart part, WithHidden with_hidden);
  // Reads the part's records into memory ahead of their use, where all of them fit into
  // the cache; false where they do not. Ends early where a stop is requested
  // (common/stop.h): what is missing is then read when it is needed.
  bool KeepAll(SplitPart part, WithHidden with_hidden);
  uint64_t kept_bytes() const { return kept_bytes_; }

  // Sequences of a part that a (stack, source layer) can use: two tokens or more in that
  // stack, and router inputs where asked for. Ascending.
  std::vector<uint32_t> Select(SplitPart part, Stack stack, WithHidden with_hidden) const;
  // Of the traced model, the task and the sequences: equal where a run may go on.
  std::string fingerprint() const;
  // `split` of results.json: documents and sequences of each part.
  Json SplitJson() const;

 private:
  struct Kept {
    std::shared_ptr<const RoutingTrace> trace;
    WithHidden with = WithHidden::kNo;  // what was asked for
  };
  // REQUIRES *mutex_ held.
  void Keep(uint32_t sequence, WithHidden with,
            std::shared_ptr<const RoutingTrace> trace);

  std::shared_ptr<const TraceReader> reader_;  // null: everything is in kept_
  TraceDatasetOptions options_;
  MoeGeometry geometry_;
  std::vector<SequenceInfo> sequences_;
  std::vector<SplitPart> parts_;
  // Of what follows up to kept_bytes_.
  std::unique_ptr<std::mutex> mutex_ = std::make_unique<std::mutex>();
  std::vector<Kept> kept_;  // parallel to sequences_
  uint64_t kept_bytes_ = 0;
  std::optional<int64_t> vocab_size_;  // once it was looked up
};

}  // namespace routecast
