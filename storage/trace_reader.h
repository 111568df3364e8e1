// Read-only access to a trace store, over all shards.
// Thread rule: construction by one thread; Read and ReadMany from any thread at once;
// Scan by one thread at a time. Memory: about 60 bytes a sequence, and block caches.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "common/routing.h"
#include "storage/store_config.h"
#include "storage/trace_format.h"

namespace routecast {

class ContextModel;
class ShardDb;
enum class Family;
// Whether router inputs are read with the routing; kAttended: attention summaries, too.
enum class WithHidden { kNo, kYes, kAttended };
// Whether a reader can do without token ids, which imported stores may not have.
enum class NeedTokens { kNo, kYes };

class TraceReader {
 public:
  // Throws UsageError (no store, another schema, no token ids where they are required),
  // DataError (damage).
  explicit TraceReader(fs::path store, NeedTokens tokens = NeedTokens::kYes);
  ~TraceReader();
  TraceReader(const TraceReader&) = delete;
  TraceReader& operator=(const TraceReader&) = delete;

  const StoreConfig& config() const { return config_; }
  const fs::path& path() const { return path_; }
  // Router weights of the model that was traced: `layer.{l}.weight` [E,D], optional
  // `layer.{l}.bias` [E], `layer.{l}.norm_gain` [D], fp32, l = global MoE layer.
  fs::path routers_path() const { return path_ / "routers.safetensors"; }
  // All sequences ascending by id: enough to split by group and to choose those with
  // router inputs, without reading records.
  const std::vector<SequenceInfo>& sequences() const { return sequences_; }
  // Those that were left out, ascending: entries of the chunk marks without tokens.
  const std::vector<SequenceInfo>& left_out() const { return left_out_; }
  std::vector<uint64_t> sequence_ids() const;
  // nullptr where the store does not hold it.
  const SequenceInfo* Find(uint64_t sequence_id) const;
  // Chunks in the store; it is complete when they are config().num_chunks.
  int64_t completed_chunks() const { return completed_chunks_; }
  bool complete() const { return completed_chunks_ == config_.num_chunks; }

  // Throws UsageError where the sequence is not in the store, DataError on damage. Router
  // inputs and attention come where asked for and recorded; empty otherwise.
  RoutingTrace Read(uint64_t sequence_id, WithHidden with_hidden) const;
  // The same for many, in the order asked; one MultiGet a shard and column family.
  std::vector<RoutingTrace> ReadMany(std::span<const uint64_t> sequence_ids,
                                     WithHidden with_hidden) const;
  // Every sequence, ascending by id, with sequential reads.
  void Scan(const std::function<void(RoutingTrace&&)>& callback,
            WithHidden with_hidden) const;

 private:
  struct Place {  // parallel to sequences_
    uint32_t chunk;
    int shard;
  };
  void ReadMarks(int shard);
  void SetAsideLeftOut();
  std::vector<Family> Wanted(WithHidden with_hidden) const;
  size_t IndexOf(uint64_t sequence_id) const;
  void FillHeader(size_t index, RoutingTrace* trace) const;
  // Into a string that is used again: said of each record, read where one is damaged.
  void SayWhere(size_t index, Stack stack, std::string* where) const;

  fs::path path_;
  StoreConfig config_;
  std::unique_ptr<ContextModel> model_;  // of coded records; null where there is none
  std::vector<std::unique_ptr<ShardDb>> shards_;
  std::vector<SequenceInfo> sequences_, left_out_;
  std::vector<Place> places_;
  int64_t completed_chunks_ = 0;
};

// Of a store with all its chunks: says in store.json that sequences were left out, where
// its marks name some, so that programs that do not know such marks refuse it. For who
// holds the store's lock, before it is sealed.
void DeclareLeftOut(const fs::path& store);

}  // namespace routecast
