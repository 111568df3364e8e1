// A rank's part of a collection once everything is open: asks for chunks, computes and
// stages them, ingests what belongs to its shards; on rank 0 also the progress of all.
// Borrows everything. Thread rule: the thread that initialised MPI. Every rank makes one.
#pragma once

#include <deque>
#include <functional>
#include <string>
#include <vector>

#include "collector/chunk_runner.h"
#include "collector/collector.h"
#include "collector/span_log.h"
#include "collector/work_exchange.h"
#include "common/progress.h"
#include "storage/trace_store.h"

namespace routecast {

// What a job works with; all outlive it.
struct CollectParts {
  const CollectOptions* options;
  const StoreConfig* config;
  const ChunkPlan* plan;
  ChunkRunner* runner;
  ShardOwner* owner;
  SpanLog* spans;
  std::string token;           // names the job's files in staging/
  std::function<void()> idle;  // called while this rank waits; may be empty
};

class CollectJob {
 public:
  // `todo` (rank 0): the chunks that are not in the store.
  CollectJob(const CollectParts& parts, const RankInfo& rank,
             const std::deque<uint32_t>& todo);
  // Until no chunk is left, a stop is requested or --max_hours are over, and all that was
  // handed out is in the store or given up on all ranks. A limit of time is looked at
  // between chunks: however small it is, every run adds at least one chunk, so a job cut
  // into short allocations ends. A signal cuts into a chunk.
  void Run();
  bool complete() const { return num_done_ == total_; }  // on rank 0
  // `in_store`: sequences of the whole store, whichever runs have collected them.
  void FinishProgress(size_t in_store);
  Json Results() const;  // for run.json

 private:
  bool OutOfTime() const;
  bool Serving();
  void Compute(uint32_t chunk);
  void Ingest(uint32_t chunk);
  void Done(const ChunkResult& result);
  // Rank 0: with what its own chunk has so far.
  void ShowProgress(const ChunkResult& under_way);
  double PaddingShare() const;
  std::string Note(const ChunkResult& all) const;
  std::string RanksNote() const;

  CollectParts parts_;
  RankInfo rank_;
  std::vector<uint64_t> chunks_of_rank_;  // rank 0: in the store, of this run
  uint64_t total_, num_done_;
  bool resumed_;                              // an earlier run has left chunks
  uint64_t text_bytes_ = 0, bytes_done_ = 0;  // rank 0: of all chunks; about
  ChunkResult sum_;
  Progress progress_;
  WorkExchange exchange_;
};

}  // namespace routecast
