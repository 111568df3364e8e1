// Which collective calls a rank has made, and who is missing where one does not end.
//
// Calls are numbered: at equal numbers all ranks stand at the same call. The last 1,000
// are kept. When a call is overdue, each rank that waits writes its calls to
// FOLDER/rank-R.jsonl and reads what the others wrote: a rank without a file, or with the
// fewest calls, is the one that they wait for. No network is asked, as that is what
// hangs.
#pragma once

#include <array>
#include <cstdint>
#include <mutex>
#include <string>

#include "common/errors.h"
#include "common/files.h"
#include "common/rank.h"

namespace routecast {

// Thread rule: any thread.
class CallWatch {
 public:
  static constexpr size_t kKept = 1000;

  // `folder` is seen by all ranks; empty = none: ranks are then not told apart.
  CallWatch(RankInfo rank, fs::path folder);
  // A call begins; its number, from 1. `name` lives as long as the process.
  uint64_t Begin(const char* name, uint64_t bytes);
  void End(uint64_t number);
  // The error of a call that did not end after `waited` seconds: names it, and the rank
  // that is missing. Takes up to `patience` seconds: others may still be waiting.
  EnvironmentError Overdue(uint64_t number, double waited, double patience = 5);
  // A line a kept call, oldest first: number, name, bytes, started (seconds since the
  // epoch), seconds (null while it is under way).
  std::string Lines() const;

 private:
  struct Call {
    uint64_t number = 0, bytes = 0;
    const char* name = "";
    double started = 0, seconds = -1;
  };
  std::string Missing(uint64_t number, double patience) const;

  RankInfo rank_;
  fs::path folder_;
  mutable std::mutex mutex_;
  uint64_t last_ = 0;
  std::array<Call, kKept> calls_;  // by number mod kKept
};

}  // namespace routecast
