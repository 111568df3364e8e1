// The sequences of a finished store in one file (index.cache), so that a reader need not
// decode and sort all chunk marks. It belongs to one state of the shards' table files;
// whatever else is found is made anew. Format: docs/trace_format.md, "The index".
// Thread rule: free functions; any number of processes on one store.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "common/files.h"
#include "storage/store_config.h"
#include "storage/trace_format.h"

namespace routecast {

class ShardDb;

struct StoreIndex {
  std::vector<SequenceInfo> sequences;  // ascending by id
  std::vector<uint32_t> chunks;         // parallel
  int64_t completed_chunks = 0;
};

// Smaller stores are known at once, without a cache.
inline constexpr uint64_t kMinCachedSequences = 1 << 14;

fs::path IndexCachePath(const fs::path& store);
// A hash of what the marks depend on: the configuration, and of each shard the identity,
// sequence number and table files with their sizes and checksums.
uint64_t StateOf(const StoreConfig& config,
                 const std::vector<std::unique_ptr<ShardDb>>& shards);
// Nothing where there is none of this state, or where its bytes are not what was written.
std::optional<StoreIndex> LoadIndexCache(const fs::path& store, uint64_t state);
// Writes it where that can be done; a store that cannot be written to has none.
void SaveIndexCache(const fs::path& store, uint64_t state, const StoreIndex& index);

}  // namespace routecast
