// Notices ranks that hang: stopped, swapped out, on a host that is gone. (A rank that
// dies ends the job through mpirun.) Every rank renews the time of a file of its own;
// rank 0 watches all others, the others watch rank 0. A process that lives but does not
// advance is not noticed here; its waits have deadlines of their own (comm/mpi_wait.h).
// Thread rule: one owner; looks from a thread of its own.
#pragma once

#include <chrono>
#include <condition_variable>
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
  ~RankWatch();  // removes this rank's file
  RankWatch(const RankWatch&) = delete;
  RankWatch& operator=(const RankWatch&) = delete;

 private:
  using Clock = std::chrono::steady_clock;
  struct Peer {
    int64_t beat_ns = -1;  // time of its file as last seen
    Clock::time_point changed;
  };
  void Run();
  void Look(Clock::time_point now);
  fs::path FileOf(int rank) const;

  fs::path folder_;
  std::string token_;
  RankInfo rank_;
  std::chrono::duration<double> limit_, period_;
  std::function<void(const std::string&)> on_hang_;
  std::map<int, Peer> peers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool ending_ = false, reported_ = false;
  std::thread thread_;
};

}  // namespace routecast
