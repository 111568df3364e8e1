// Who computes and who ingests which chunk: a manager on rank 0, workers on every rank,
// shard owners on every rank. Two-sided MPI with small messages; each rank serves what
// has arrived between its own batches.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <optional>
#include <set>
#include <vector>

#include "common/rank.h"

namespace routecast {

// What a chunk brought, and who computed it. `computed_tokens` counts padding as well;
// `left_out`: sequences beside `sequences`.
struct ChunkResult {
  int64_t rank = 0, chunk = 0, sequences = 0, tokens = 0, computed_tokens = 0,
          record_bytes = 0, left_out = 0;
};

// Thread rule: one thread of the process, the one that initialised MPI. Every rank makes
// one.
class WorkExchange {
 public:
  struct Callbacks {
    // Takes a staged chunk into a shard of this rank.
    std::function<void(uint32_t chunk)> ingest;
    // Rank 0: a chunk is in the store.
    std::function<void(const ChunkResult&)> done;
    // Called while this rank waits; may be empty. Others may wait for what it does.
    std::function<void()> idle;
  };
  // `todo` (rank 0 only): chunks to compute, in the order to hand them out.
  WorkExchange(const RankInfo& rank, int num_shards, std::deque<uint32_t> todo,
               Callbacks callbacks);

  // The next chunk for this rank; serves others while it waits. Nothing where none is
  // left or the work is ending. Asks one ahead, so that ranks rarely wait.
  std::optional<uint32_t> Next();
  // This rank's chunk lies in staging.
  void Staged(const ChunkResult& result);
  // This rank gives up the chunk that it was computing.
  void Abandoned(uint32_t chunk);
  // Handles what has arrived.
  void Serve();
  // Rank 0: hand out nothing more (a stop was requested).
  void Close() { todo_.clear(); }
  // Serves until every chunk that was handed out is in the store or given up, on all
  // ranks.
  void Drain();

 private:
  enum Kind : int64_t { kRequest, kAssign, kStaged, kIngested, kAbandoned, kFinish };
  struct Message {
    int64_t kind;
    ChunkResult result;
  };
  void Send(int to, const Message& message);
  void Handle(int from, const Message& message);
  void Request();
  void Assign(int to);
  bool Poll();
  void PollOrRest();

  RankInfo rank_;
  int num_shards_;
  std::deque<uint32_t> todo_;
  Callbacks callbacks_;
  std::deque<std::pair<int, Message>> own_;  // messages of this rank to itself
  std::set<int64_t> outstanding_;            // rank 0: handed out, not yet in the store
  int ended_workers_ = 0;                    // rank 0: told that nothing is left
  bool requested_ = false, no_more_ = false, finished_ = false;
  std::deque<uint32_t> assigned_;
};

}  // namespace routecast
