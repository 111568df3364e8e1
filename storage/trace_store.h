// Writing a trace store: any rank computes a chunk into staging files, the owner of the
// chunk's shard ingests them, records and completion mark in one atomic step. A chunk is
// in the store once, wholly, or not at all, whatever is killed when.
//
// store/  store.json  routers.safetensors  shards/NNNNN/ (RocksDB)  staging/  lock.json
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "common/files.h"
#include "common/routing.h"
#include "storage/shard_seal.h"
#include "storage/store_config.h"
#include "storage/trace_format.h"

namespace routecast {

// Told the name of each step before it is taken. Tests end the process there.
using StepObserver = std::function<void(const char* step)>;
// The step of ShardOwner that is taken for each MiB of a seal.
inline constexpr const char* kHashStep = "seal: hash";

class TraceStore {
 public:
  // Creates the store, or opens it when it is there already and `wanted` would make the
  // same records, or the same and those of a further intake, which is then entered in
  // store.json (the seals go before: what they say is no longer so). Throws UsageError
  // with both values where it would not, or where `path` holds something else; DataError
  // where store.json is damaged. REQUIRES StoreLock where others may write.
  static StoreConfig CreateOrOpen(const fs::path& path, const StoreConfig& wanted);
  // Throws as CreateOrOpen where `wanted` does not go on with `stored`; writes nothing.
  static void RequireGoesOn(const fs::path& path, const StoreConfig& stored,
                            const StoreConfig& wanted);
  // Opens an existing store's configuration. UsageError where there is none.
  static StoreConfig Open(const fs::path& path);
  // Removes what unfinished jobs left in staging/. REQUIRES holding StoreLock.
  static void CleanStaging(const fs::path& path);
  static int ShardOf(const StoreConfig& config, uint32_t chunk) {
    return static_cast<int>(chunk % static_cast<uint32_t>(config.num_shards));
  }
  // Where job `token` stages `chunk`.
  static fs::path StagingFolder(const fs::path& path, uint32_t chunk,
                                const std::string& token);
};

// Collects one chunk's sequences and writes them to staging. Any rank, no lock.
// Thread rule: one thread. Memory: the encoded chunk.
class ChunkWriter {
 public:
  ChunkWriter(fs::path store, const StoreConfig& config, uint32_t chunk,
              std::string token, StepObserver on_step = {});
  // Any order; REQUIRES ids not added before (std::logic_error). A trace without tokens
  // is entered as left out.
  void Add(const RoutingTrace& trace);
  // Sorts, writes, syncs and renames into staging/. EnvironmentError when the disk is
  // full: nothing of the chunk is left then.
  void Finish();
  uint64_t record_bytes() const { return record_bytes_; }

 private:
  void AddSpan(const RoutingTrace& trace, Stack stack);
  void Step(const char* name) const;
  fs::path store_;
  const StoreConfig config_;
  ChunkMark mark_;
  std::string token_;
  StepObserver on_step_;
  // Of each column family; key order = file order.
  std::map<std::string, std::string> routing_, hidden_, attention_;
  uint64_t record_bytes_ = 0;
};

class ShardDb;

// The one writer of the shards it owns in this job.
// Thread rule: one thread. Files: 16 a shard stay open, however many chunks are in
// it; a shard's routing tables are merged where they would be too many to be read at
// once.
class ShardOwner {
 public:
  // Opens shards `first`, `first + step`, ... REQUIRES that no other process owns them.
  ShardOwner(fs::path store, const StoreConfig& config, int first, int step,
             StepObserver on_step = {});
  ~ShardOwner();
  bool Owns(uint32_t chunk) const;
  // Chunks that are in the shards it owns, ascending.
  std::vector<uint32_t> CompletedChunks() const { return {done_.begin(), done_.end()}; }
  // Takes a staged chunk into its shard and removes the staging folder. False (and only
  // the removal) when it was there already. REQUIRES Owns(chunk).
  bool Ingest(uint32_t chunk, const std::string& token);
  // Merges the files of each shard's routing family into one sorted run: reads touch one
  // file. Where ids are to be coded (MakeContextModel was called), codes them first. Does
  // nothing where it is done already. StoppedError where a stop is requested: the store
  // is readable, and the next job goes on.
  void Compact();
  // The end of a complete store: Compact, close, seal. It owns nothing afterwards.
  void Finish();

 private:
  void Step(const char* name) const;
  void TakeSeal(int shard);
  // Of the routing family, into one sorted run. False where a stop was requested first.
  bool Merge(const ShardDb& shard) const;
  fs::path store_;
  const StoreConfig config_;
  StepObserver on_step_;
  std::map<int, std::unique_ptr<ShardDb>> shards_;
  std::set<uint32_t> done_;         // chunks in them
  std::map<int, ShardSeal> seals_;  // of before this job
};

}  // namespace routecast
