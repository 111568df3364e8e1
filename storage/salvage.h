// What can still be read of a damaged store, without trusting more of it than needed:
// table files are searched for records, which carry checksums of their own, so that
// damage to a manifest, an index, a footer or a block costs at most the records beside
// the damaged byte. Thread rule: one thread. Memory: about 100 bytes a record.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "common/files.h"
#include "common/routing.h"
#include "storage/store_config.h"
#include "storage/trace_format.h"

namespace routecast {

class ContextModel;

// Where a sound record lies in a table file.
struct RecordPlace {
  uint64_t at = 0;  // of the value, in the file or in the unpacked frame
  uint32_t bytes = 0;
  uint64_t frame = 0;        // of the compressed block
  uint32_t frame_bytes = 0;  // 0 = not compressed
};
// Finds every record of a table file's bytes whose checksum is right. `model`: the
// fingerprint of the store's context model; 0 = it has none.
void FindRecords(
    std::string_view table, uint64_t model,
    const std::function<void(std::string_view key, const RecordPlace&)>& found);

class Salvage {
 public:
  // Searches all shards. UsageError where the folder is no store; DataError where neither
  // store.json nor a seal says what it is made of.
  explicit Salvage(fs::path store);
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
  void Search(const fs::path& table);
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
