#include "collector/work_exchange.h"

#include <mpi.h>

#include <chrono>
#include <thread>

namespace routecast {
namespace {
constexpr int kTag = 17;
constexpr int64_t kNoChunk = -1;
// Between two looks for messages where there is nothing to compute. MPI's blocking calls
// would spin, and take the core from ranks that still compute.
constexpr auto kIdle = std::chrono::microseconds(500);
}  // namespace

WorkExchange::WorkExchange(const RankInfo& rank, int num_shards,
                           std::deque<uint32_t> todo, Callbacks callbacks)
    : rank_(rank),
      num_shards_(num_shards),
      todo_(std::move(todo)),
      callbacks_(std::move(callbacks)) {}

void WorkExchange::Send(int to, const Message& message) {
  if (to == rank_.rank) {
    own_.emplace_back(to, message);
    return;
  }
  // 56 bytes travel eagerly: a standard send returns at once.
  MPI_Send(&message, sizeof message, MPI_BYTE, to, kTag, MPI_COMM_WORLD);
}

bool WorkExchange::Poll() {
  if (!own_.empty()) {
    const auto [from, message] = own_.front();
    own_.pop_front();
    Handle(from, message);
    return true;
  }
  if (rank_.world == 1) return false;
  int arrived = 0;
  MPI_Status status;
  MPI_Iprobe(MPI_ANY_SOURCE, kTag, MPI_COMM_WORLD, &arrived, &status);
  if (!arrived) return false;
  Message message;
  MPI_Recv(&message, sizeof message, MPI_BYTE, status.MPI_SOURCE, kTag, MPI_COMM_WORLD,
           MPI_STATUS_IGNORE);
  Handle(status.MPI_SOURCE, message);
  return true;
}

void WorkExchange::PollOrRest() {
  if (callbacks_.idle) callbacks_.idle();
  if (!Poll()) std::this_thread::sleep_for(kIdle);
}

void WorkExchange::Serve() {
  while (Poll()) {
  }
}

void WorkExchange::Assign(int to) {
  int64_t chunk = kNoChunk;
  if (!todo_.empty()) {
    chunk = todo_.front();
    todo_.pop_front();
    outstanding_.insert(chunk);
  } else {
    ++ended_workers_;
  }
  Send(to, {kAssign, {.chunk = chunk}});
}

void WorkExchange::Handle(int from, const Message& m) {
  switch (m.kind) {
    case kRequest:
      Assign(from);
      break;
    case kAssign:
      requested_ = false;
      if (m.result.chunk == kNoChunk) {
        no_more_ = true;
      } else {
        assigned_.push_back(static_cast<uint32_t>(m.result.chunk));
      }
      break;
    case kStaged:
      callbacks_.ingest(static_cast<uint32_t>(m.result.chunk));
      Send(0, {kIngested, m.result});
      break;
    case kIngested:
      outstanding_.erase(m.result.chunk);
      callbacks_.done(m.result);
      break;
    case kAbandoned:
      outstanding_.erase(m.result.chunk);
      break;
    case kFinish:
      finished_ = true;
      break;
  }
}

void WorkExchange::Request() {
  if (requested_ || no_more_) return;
  requested_ = true;
  Send(0, {kRequest, {.chunk = kNoChunk}});
}

std::optional<uint32_t> WorkExchange::Next() {
  Request();
  while (assigned_.empty() && !no_more_) {
    PollOrRest();
  }
  if (assigned_.empty()) return std::nullopt;
  const uint32_t chunk = assigned_.front();
  assigned_.pop_front();
  Request();
  return chunk;
}

void WorkExchange::Staged(const ChunkResult& r) {
  Send(static_cast<int>(r.chunk % num_shards_) % rank_.world, {kStaged, r});
}

void WorkExchange::Abandoned(uint32_t chunk) { Send(0, {kAbandoned, {.chunk = chunk}}); }

void WorkExchange::Drain() {
  // What was asked ahead is given back, then this rank waits for the word of rank 0.
  while (requested_ || !no_more_ || !assigned_.empty()) {
    for (; !assigned_.empty(); assigned_.pop_front()) Abandoned(assigned_.front());
    Request();
    PollOrRest();
  }
  while (!finished_) {
    if (rank_.is_root() && ended_workers_ == rank_.world && outstanding_.empty()) {
      for (int r = 0; r < rank_.world; ++r) Send(r, {kFinish, {.chunk = kNoChunk}});
    }
    PollOrRest();
  }
}

}  // namespace routecast
