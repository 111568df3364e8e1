// Chunks of which a shard has lost records: their marks are removed, so that the next job
// computes them anew.
// Thread rule: one thread; REQUIRES that the shard is open for writing.
#pragma once

#include "storage/trace_store.h"

namespace routecast {

class ShardDb;

// After ShardDb went back to a state whose table files are all there (WentBack): it does
// so family by family, so chunks may have marks and routing, and their router inputs or
// attention are gone. Removes these marks, durably, then forgets that it went back; a
// death in between leaves it to the next job. Reads the records beside the routing once.
void RemoveMarksOfLostChunks(ShardDb* shard, const StoreConfig& config,
                             const StepObserver& on_step);

}  // namespace routecast
