#include "collector/span_log.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <fstream>

#include "common/errors.h"

namespace routecast {
namespace {

fs::path PathOf(const fs::path& store, const RankInfo& rank) {
  char name[32];
  std::snprintf(name, sizeof name, "rank-%05d.jsonl", rank.rank);
  return store / "spans" / name;
}

}  // namespace

ProcessMemory OwnMemory() {
  std::ifstream in("/proc/self/statm");
  int64_t total = 0, resident = 0, shared = 0;
  in >> total >> resident >> shared;
  const int64_t page = ::sysconf(_SC_PAGESIZE);
  return {resident * page, (resident - shared) * page};
}

SpanLog::SpanLog(const fs::path& store, const RankInfo& rank)
    : path_(PathOf(store, rank)) {
  MakeFolder(path_.parent_path());
  fd_ = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (fd_ < 0) ThrowErrno(errno, "open", path_);
}

SpanLog::~SpanLog() { ::close(fd_); }

void SpanLog::Write(const std::string& span, Clock::time_point begin, Json more) {
  more["span"] = span;
  more["time"] =
      std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch())
          .count();
  more["seconds"] = std::chrono::duration<double>(Clock::now() - begin).count();
  const ProcessMemory memory = OwnMemory();
  more["resident_bytes"] = memory.resident_bytes;
  more["anonymous_bytes"] = memory.anonymous_bytes;
  const std::string line = more.dump() + "\n";
  // One call, but for a disk that is full or takes a part at first.
  for (size_t done = 0; done < line.size();) {
    const ssize_t n = ::write(fd_, line.data() + done, line.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) ThrowErrno(errno, "write", path_);
    done += static_cast<size_t>(n);
  }
}

}  // namespace routecast
