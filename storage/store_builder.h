// A whole new trace store, written by one process in one go: what merge, subset and
// import make. It is built beside its place (OUT.tmp) and renamed at the end: OUT is a
// complete store or is not there. An unfinished one is removed by the next attempt.
// Thread rule: one thread. Memory: one chunk (about 8 MiB of records).
#pragma once

#include <memory>
#include <string>

#include "storage/build_lock.h"
#include "storage/trace_reader.h"
#include "storage/trace_store.h"

namespace routecast {

// Bytes of records after which a chunk ends; with the sequences it decides the chunks.
inline constexpr uint64_t kBuiltChunkBytes = uint64_t{8} << 20;

class StoreBuilder {
 public:
  // `config.num_chunks` is set by Finish. UsageError where `out` is there already,
  // EnvironmentError where another process is making it.
  StoreBuilder(const fs::path& out, StoreConfig config, StepObserver on_step = {});
  ~StoreBuilder();
  // REQUIRES ascending sequence ids (std::logic_error). StoppedError where a stop was
  // requested: nothing of the store is left then.
  void Add(const RoutingTrace& trace);
  // Names a sequence that the inputs left out; any order, ids not added.
  void LeaveOut(const SequenceInfo& info);
  // Copies `routers.safetensors` of an existing store.
  void CopyRouters(const fs::path& routers);
  // Writes store.json, syncs, renames. UsageError where no sequence was added.
  void Finish();
  uint64_t num_sequences() const { return num_sequences_; }

 private:
  void StartChunk();
  void EndChunk();
  void AddLeftOut();

  StoreConfig config_;
  StepObserver on_step_;
  BuildLock lock_;  // before the folder, which it guards
  SealedFolder folder_;
  std::unique_ptr<ShardOwner> owner_;
  std::unique_ptr<ChunkWriter> chunk_;
  std::vector<SequenceInfo> left_out_;
  uint64_t num_sequences_ = 0, last_id_ = 0;
};

// UsageError where `out` cannot become a new store, before anything is read or written.
// It may hold the run.json of a run that failed.
void RequireNewStore(const fs::path& out);
// Throws UsageError where `input` lies where `out` is built (OUT.tmp), which is emptied.
void RequireApart(const fs::path& out, const fs::path& input);
// A store that is merged or cut must have all its chunks. UsageError otherwise.
void RequireComplete(const TraceReader& reader);

}  // namespace routecast
