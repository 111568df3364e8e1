#include "storage/lost_chunks.h"

#include <string>
#include <vector>

#include "storage/shard_db.h"
#include "storage/trace_format.h"

namespace routecast {
namespace {

bool HasRecord(const ShardDb& shard, Family family, const std::string& key) {
  rocksdb::ReadOptions options;
  options.fill_cache = false;
  rocksdb::PinnableSlice value;
  const rocksdb::Status status =
      shard.db()->Get(options, shard.family(family), key, &value);
  if (!status.IsNotFound()) CheckStatus(status, "read", shard.path());
  return status.ok();
}

// Of one sequence: what lies beside its routing.
bool IsWhole(const ShardDb& shard, const StoreConfig& config, const SequenceInfo& info) {
  for (const Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
    const bool run =
        (stack == Stack::kEncoder ? info.encoder_tokens : info.decoder_tokens) > 0;
    if (!run || !info.has_hidden) continue;
    const std::string key = EncodeKey(KindOf(stack), info.sequence_id);
    if (!HasRecord(shard, Family::kHidden, key)) return false;
    if (config.AttentionHeads(stack) > 0 && !HasRecord(shard, Family::kAttention, key)) {
      return false;
    }
  }
  return true;
}

// Keys of the marks of chunks that lack records.
std::vector<std::string> LostMarks(const ShardDb& shard, const StoreConfig& config,
                                   const StepObserver& on_step) {
  std::vector<std::string> lost;
  const std::unique_ptr<rocksdb::Iterator> it(
      shard.db()->NewIterator(rocksdb::ReadOptions(), shard.family(Family::kRouting)));
  for (it->Seek(EncodeKey(RecordKind::kChunkMark, 0)); it->Valid(); it->Next()) {
    if (on_step) on_step("recover: look at chunks");
    const ChunkMark mark =
        DecodeMark(it->key().ToStringView(), it->value().ToStringView(),
                   shard.path().string() + ": chunk mark");
    for (const SequenceInfo& info : mark.sequences) {
      if (IsWhole(shard, config, info)) continue;
      lost.push_back(it->key().ToString());
      break;
    }
  }
  CheckStatus(it->status(), "read", shard.path());
  return lost;
}

}  // namespace

void RemoveMarksOfLostChunks(ShardDb* shard, const StoreConfig& config,
                             const StepObserver& on_step) {
  std::vector<std::string> lost = LostMarks(*shard, config, on_step);
  if (!lost.empty()) {
    // As many records as before will be there, and not all of them coded.
    lost.push_back(EncodeKey(RecordKind::kCoderMark, 0));
    rocksdb::WriteBatch batch;
    for (const std::string& key : lost) {
      CheckStatus(batch.Delete(shard->family(Family::kRouting), key), "remove marks of",
                  shard->path());
    }
    if (on_step) on_step("recover: remove marks");
    rocksdb::WriteOptions options;
    options.disableWAL = true;  // the flush makes a table of it
    CheckStatus(shard->db()->Write(options, &batch), "remove marks of", shard->path());
    CheckStatus(
        shard->db()->Flush(rocksdb::FlushOptions(), shard->family(Family::kRouting)),
        "remove marks of", shard->path());
  }
  if (on_step) on_step("recover: done");
  shard->ForgetWentBack();
}

}  // namespace routecast
