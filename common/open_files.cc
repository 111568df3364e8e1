#include "common/open_files.h"

#include <sys/resource.h>

#include <algorithm>
#include <cerrno>

#include "common/errors.h"
#include "common/files.h"

namespace routecast {
namespace {

rlimit Limit() {
  rlimit limit;
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) ThrowErrno(errno, "getrlimit", "");
  return limit;
}

}  // namespace

uint64_t RaiseOpenFileLimit() {
  constexpr rlim_t kMost = 1 << 20;  // what the kernel grants at most, where not told
  rlimit limit = Limit();
  const rlim_t before = limit.rlim_cur;
  limit.rlim_cur = std::max(before, std::min(limit.rlim_max, kMost));
  if (::setrlimit(RLIMIT_NOFILE, &limit) != 0) return before;
  return limit.rlim_cur;
}

uint64_t OpenFileLimit() { return Limit().rlim_cur; }

uint64_t OpenFilesLeft() {
  std::error_code error;  // also where no file is left to look with
  uint64_t open = 0;
  for (fs::directory_iterator it("/proc/self/fd", error), end; !error && it != end;
       it.increment(error)) {
    ++open;
  }
  const uint64_t limit = OpenFileLimit();
  return error ? 0 : limit - std::min(open, limit);
}

void RequireOpenFiles(uint64_t files, const std::string& what,
                      const std::string& otherwise) {
  const uint64_t most = RaiseOpenFileLimit();
  if (files <= most) return;
  throw EnvironmentError(ErrorText(
      what + " holds up to " + std::to_string(files) + " files open in a process",
      "the limit is " + std::to_string(most),
      "raise it (ulimit -n " + std::to_string(files) + "), or " + otherwise));
}

}  // namespace routecast
