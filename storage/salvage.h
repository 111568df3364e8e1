// What can still be read of a damaged store, without trusting more of it than needed:
// table files are searched for records, which carry checksums of their own, so that
// damage to a manifest, an index, a footer or a block costs at most the records beside
// the damaged byte. Thread rule: one thread. Memory: about 100 bytes a record, and
// what record_search.h takes, however large the files are.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "common/files.h"
#include "common/routing.h"
#include "storage/record_search.h"
#include "storage/store_config.h"
#include "storage/trace_format.h"

namespace routecast {

class ContextModel;

class Salvage {
 public:
  // Searches all shards, through a window of so many bytes of each file. UsageError where
  // the folder is no store; DataError where neither store.json nor a seal says what it is
  // made of; EnvironmentError where the disk cannot read a file.
  explicit Salvage(fs::path store, size_t window_bytes = kSearchWindowBytes);
  ~Salvage();
  const StoreConfig& config() const { return config_; }
  // Of all chunks whose mark is sound, in a table or in a seal; ascending by id.
  const std::vector<SequenceInfo>& sequences() const { return sequences_; }
  // Chunks of which nothing is known any more.
  int64_t lost_chunks() const { return config_.num_chunks - found_chunks_; }
  // routers.safetensors; empty where there is none, or it is not as it was sealed.
  const fs::path& routers() const { return routers_; }
  // A sequence with router inputs where it had them; nothing where a record is lost.
  std::optional<RoutingTrace> Read(const SequenceInfo& info) const;

 private:
  struct Found {
    size_t file;
    RecordPlace place;
  };
  void Search(const fs::path& table, size_t window_bytes);
  std::string Load(const Found& found) const;
  bool ReadStack(const SequenceInfo& info, Stack stack, RoutingTrace* trace) const;

  fs::path store_;
  StoreConfig config_;
  std::unique_ptr<ContextModel> model_;  // null: not coded, or the model is damaged
  fs::path routers_;
  std::vector<fs::path> files_;
  std::map<std::string, std::vector<Found>, std::less<>> records_;  // by key
  std::map<uint32_t, ChunkMark> marks_;
  std::vector<SequenceInfo> sequences_;
  int64_t found_chunks_ = 0;
};

struct SalvageReport {
  uint64_t sequences = 0, lost = 0;
  int64_t lost_chunks = 0;
  std::vector<uint64_t> lost_ids;  // the first hundred
};
// Makes the new store `out` of the sequences of `store` that are sound. UsageError where
// none is, or where `out` is there.
SalvageReport SalvageStore(const fs::path& store, const fs::path& out);

}  // namespace routecast
