// What --dry_run of routecast-collect says and refuses, with nothing made or changed.
// Thread rule: one thread.
#pragma once

#include "collector/chunk_plan.h"
#include "collector/collector.h"

namespace routecast {

// Rank 0 prints the plan: what there is to do, what it takes. REQUIRES a loaded model:
// the memory is that of this process. Throws what the job would: UsageError (another
// configuration in the store, no permission to write), EnvironmentError (no room for the
// chunks that the store does not have yet).
void DryRun(const CollectOptions& options, const StoreConfig& config,
            const Corpus& corpus, const ChunkPlan& plan, const RankInfo& rank);

}  // namespace routecast
