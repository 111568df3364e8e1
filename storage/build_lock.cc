#include "storage/build_lock.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>

#include "common/errors.h"
#include "common/temporary_file.h"

namespace routecast {
namespace {

// Of a folder, whose name may end in a slash.
fs::path LockPath(const fs::path& out) {
  const fs::path name = out.has_filename() ? out : out.parent_path();
  return name.string() + ".tmp.lock";
}

}  // namespace

BuildLock::BuildLock(const fs::path& out) : path_(LockPath(out)) {
  if (path_.has_parent_path()) MakeFolder(path_.parent_path());
  // Between its opening and its locking, who held it may have removed it.
  do {
    if (fd_ >= 0) ::close(fd_);
    fd_ = ::open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0644);
    if (fd_ < 0) ThrowErrno(errno, "create", path_);
    int failed = 0;
    while ((failed = ::flock(fd_, LOCK_EX | LOCK_NB)) != 0 && errno == EINTR) {
    }
    if (failed == 0 || errno != EWOULDBLOCK) continue;
    ::close(fd_);
    throw EnvironmentError(ErrorText(out.string() + " is being made by another process",
                                     "it holds " + path_.string(),
                                     "wait for it, or name another --out"));
  } while (!HasName(fd_, path_));
}

BuildLock::~BuildLock() {
  ::unlink(path_.c_str());  // before others can have it
  ::close(fd_);
}

}  // namespace routecast
