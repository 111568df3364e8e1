// What --dry_run of routecast-collect says and refuses, with nothing made or changed.
// Thread rule: one thread.
#pragma once

#include "collector/collect_sources.h"
#include "collector/collector.h"
#include "corpus/tokenizer.h"

namespace routecast {

// What the weights of a rank will take, and where.
struct PlannedWeights {
  uint64_t bytes = 0;
  at::Device device;
};

// Rank 0 prints the plan: what there is to do, what it takes. Throws what the job would:
// UsageError (another configuration in the store, no permission to write),
// EnvironmentError (no room for the chunks that the store does not have yet).
void DryRun(const CollectOptions& options, const StoreConfig& config,
            const CollectSources& sources, const Tokenizer& tokenizer,
            const PlannedWeights& weights, const RankInfo& rank);

}  // namespace routecast
