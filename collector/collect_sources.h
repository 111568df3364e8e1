// The sources of a store and of a command, and what of them is collected.
#pragma once

#include <functional>
#include <optional>
#include <vector>

#include "collector/chunk_plan.h"
#include "collector/collector.h"
#include "storage/store_config.h"

namespace routecast {

struct CollectSources {
  Corpus corpus;
  ChunkPlan plan;
  std::vector<StoreIntake> intakes;  // of the store, and the one that the command adds
};

// The same on every rank. `share` makes rank 0's numbers everybody's. All ranks call it,
// before rank 0 writes the store. Nothing where a stop was requested. Throws as
// Corpus::OpenIntakes and ListIntakes do.
std::optional<CollectSources> OpenSources(
    const CollectOptions& options, const Tokenizer& tokenizer, const RankInfo& rank,
    int threads, const std::function<void(std::vector<int64_t>*)>& share);

}  // namespace routecast
