// A seeded share of a store as a store of its own (docs/trace_format.md, "Subset").
// Thread rule: one thread. Memory: one batch of traces and one chunk.
#pragma once

#include <vector>

#include "storage/trace_reader.h"
#include "storage/trace_store.h"

namespace routecast {

struct SubsetOptions {
  std::string compression = {};  // of the new store; empty = the store's
  double share = 0.1;            // of the document groups, above 0, up to 1
  uint64_t seed = 1;             // another seed, another draw
};

// True for the groups of a subset. A keyed hash of the group alone: the same in every
// store, and those of a smaller share are among those of a larger one.
bool InSubset(uint64_t group_id, const SubsetOptions& options);

void RequireShare(double share);  // throws UsageError outside (0, 1]

// The ids of the sequences that SubsetStore would take. Throws as it does; writes
// nothing.
std::vector<uint64_t> DrawSubset(const TraceReader& reader, const fs::path& out,
                                 const SubsetOptions& options);

// Makes `out` of the sequences whose group is drawn; returns how many they are. Ids stay.
// UsageError: a share outside (0, 1], an unfinished store, nothing drawn, `out` is there.
uint64_t SubsetStore(const fs::path& store, const fs::path& out,
                     const SubsetOptions& options, StepObserver on_step = {});

}  // namespace routecast
