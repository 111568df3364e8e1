// Notices ranks that hang: stopped, swapped out, on a host that is gone, waiting for what
// never comes. (A rank that dies ends the job through mpirun.) Every rank renews the time
// of a file of its own as long as it advances: its work shows life (life_signs.h), or the
// process takes the time of a core, as it does in a long layer, a merge of tables or a
// spinning wait of MPI. Rank 0 watches all others, the others watch rank 0. What spins
// without end is not noticed. A rank that has come to its end removes its file, and is
// missed by nobody. Thread rule: one owner; looks from a thread of its own.
#pragma once

#include <chrono>
#include <condition_variable>
#include <exception>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>

#include "common/files.h"
#include "common/rank.h"

namespace routecast {

class RankWatch {
 public:
  // `folder`: on a file system that all ranks share; `token`: the same on all ranks, new
  // for each job. `on_hang` gets an error of three lines (rank, host, process, seconds)
  // where a rank showed no life for `limit_seconds`; called on the watching thread, once.
  // A world of one does nothing. EnvironmentError where the file cannot be made.
  RankWatch(const fs::path& folder, const std::string& token, const RankInfo& rank,
            double limit_seconds, std::function<void(const std::string&)> on_hang);
  ~RankWatch();  // removes this rank's file, but where an exception ends it
  RankWatch(const RankWatch&) = delete;
  RankWatch& operator=(const RankWatch&) = delete;

 private:
  using Clock = std::chrono::steady_clock;
  struct Peer {
    int64_t beat_ns = -1;  // time of its file as last seen
    Clock::time_point changed;
  };
  void Run();
  // Since the last call: a sign of life, or time of a core beyond this thread's own.
  bool Advanced(std::chrono::duration<double> elapsed);
  void Look(Clock::time_point now);
  fs::path FileOf(int rank) const;

  fs::path folder_;
  std::string token_;
  RankInfo rank_;
  std::chrono::duration<double> limit_, period_;
  std::function<void(const std::string&)> on_hang_;
  std::map<int, Peer> peers_;
  const int exceptions_ = std::uncaught_exceptions();
  uint64_t seen_signs_ = 0;
  double seen_cpu_ = 0;  // seconds of the process without the watching thread's
  std::mutex mutex_;
  std::condition_variable wake_;
  bool ending_ = false, reported_ = false;
  std::thread thread_;
};

}  // namespace routecast
