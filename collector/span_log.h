// What a rank did when, and how long it took: STORE/spans/rank-NNNNN.jsonl, a line a
// span, appended by every run. For people and tools; nothing reads it back. Thread rule:
// one thread.
#pragma once

#include <chrono>
#include <string>

#include "common/files.h"
#include "common/rank.h"
#include "common/run_record.h"

namespace routecast {

// Of these, `anonymous_bytes` leave out mapped files, which the kernel takes back when it
// needs room.
struct ProcessMemory {
  int64_t resident_bytes = 0, anonymous_bytes = 0;
};
ProcessMemory OwnMemory();

class SpanLog {
 public:
  using Clock = std::chrono::steady_clock;
  // Makes the folder. EnvironmentError where it cannot.
  SpanLog(const fs::path& store, const RankInfo& rank);
  ~SpanLog();
  SpanLog(const SpanLog&) = delete;
  SpanLog& operator=(const SpanLog&) = delete;

  // A line: `span`, `time` (its end, seconds since 1970), `seconds` since `begin`,
  // this process' memory (`resident_bytes`, `anonymous_bytes`), and what `more` holds.
  void Write(const std::string& span, Clock::time_point begin, Json more);

 private:
  fs::path path_;
  int fd_;
};

}  // namespace routecast
