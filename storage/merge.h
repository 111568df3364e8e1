// Several stores of one model become one (docs/trace_format.md, "Merge").
// Thread rule: one thread. Memory: about 8 MiB of traces a store, and one chunk.
#pragma once

#include <vector>

#include "storage/trace_store.h"

namespace routecast {

struct MergeOptions {
  std::string compression = {};  // of the new store; empty = the first store's
  // Sequence and document ids name documents of one corpus, so stores of different
  // corpora are refused; true gives those of every further corpus new ids above the
  // earlier ones'.
  bool renumber = false;
};

struct MergeReport {
  uint64_t sequences = 0;  // in the result
  uint64_t repeated = 0;   // that several stores held, with equal bytes
};

// Keys in which stores disagree that must not be merged, as "key: a, not b". What may
// differ: names, corpus, shards, chunks, seeds and what only moves margin ties (threads,
// device, batch shapes). A key this list does not know must agree.
std::vector<std::string> MergeDifferences(const StoreConfig& a, const StoreConfig& b);

// Makes `out` of `stores` (one or more). The result does not depend on their order but in
// the configuration's names, which are the first's, and in new ids. UsageError: other
// model, other recordings, other corpora (without renumber), an unfinished store, `out`
// is there. DataError: a sequence that two stores hold with different bytes.
MergeReport MergeStores(const std::vector<fs::path>& stores, const fs::path& out,
                        const MergeOptions& options, StepObserver on_step = {});

// What MergeStores would refuse before it reads a record, and what it would make. Writes
// nothing.
MergeReport CheckMerge(const std::vector<fs::path>& stores, const fs::path& out,
                       const MergeOptions& options);

}  // namespace routecast
