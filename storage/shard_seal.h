// The seal of a shard whose collection is complete: what every file of it was when its
// last writer closed it, and copies of what a reader needs first (configuration, chunk
// marks). A flipped byte anywhere is found against it. docs/trace_format.md, "Seals".
// Thread rule: free functions; the shard must be closed, and not written meanwhile.
#pragma once

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "common/files.h"

namespace routecast {

struct ShardSeal {
  struct File {
    uint64_t bytes = 0, hash = 0;
  };
  std::map<std::string, File> files;      // by path below the store
  std::string config;                     // text of store.json
  std::map<uint32_t, std::string> marks;  // value of each chunk mark
};

// Hashes the shard's files, store.json and routers.safetensors, and writes the seal.
// Table files that `before` knows by name and size keep their hash: they never change,
// and one that did all the same is to be found. `on_block` is called after each MiB that
// is hashed.
void WriteShardSeal(const fs::path& store, int shard,
                    const std::map<uint32_t, std::string>& marks,
                    const std::optional<ShardSeal>& before,
                    const std::function<void()>& on_block = {});
// Nothing where the shard is not sealed. DataError where the seal itself is damaged.
std::optional<ShardSeal> ReadShardSeal(const fs::path& store, int shard);
// Numbers of the shards that have a seal, ascending: also of those whose folder is gone.
std::vector<int> SealedShards(const fs::path& store);
// To be done, durably, before a shard is opened for writing.
void RemoveShardSeal(const fs::path& store, int shard);
// Tells each way in which the files are not as sealed, by path.
void CompareWithSeal(const fs::path& store, int shard, const ShardSeal& seal,
                     const std::function<void(const std::string&)>& problem);

}  // namespace routecast
