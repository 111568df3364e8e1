#include "common/temporary_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <string>
#include <vector>

#include "common/errors.h"

namespace routecast {

bool HasName(int fd, const fs::path& path) {
  struct stat open_file, named;
  return ::fstat(fd, &open_file) == 0 && ::stat(path.c_str(), &named) == 0 &&
         open_file.st_dev == named.st_dev && open_file.st_ino == named.st_ino;
}

namespace {

void RemoveUnlessLocked(const fs::path& temporary) {
  const int fd = ::open(temporary.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  if (fd < 0) return;
  // The name may have gone over to a living writer's file before the lock was taken.
  if (::flock(fd, LOCK_EX | LOCK_NB) == 0 && HasName(fd, temporary)) {
    ::unlink(temporary.c_str());
  }
  ::close(fd);
}

}  // namespace

int OpenTemporary(const fs::path& path, fs::path* temporary) {
  RemoveLeftovers(path);
  *temporary = path.string() + "." + std::to_string(::getpid()) + ".tmp";
  // Between its making and its locking another writer may take the file for a leftover.
  for (;;) {
    // The name can be guessed: a link under it, laid by somebody, is not written through.
    const int fd =
        ::open(temporary->c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0644);
    if (fd < 0) ThrowErrno(errno, "create", *temporary);
    while (::flock(fd, LOCK_EX) != 0 && errno == EINTR) {
    }
    const bool there = HasName(fd, *temporary);
    if (there && ::ftruncate(fd, 0) == 0) return fd;
    const int error = errno;
    ::close(fd);
    if (!there) continue;
    ::unlink(temporary->c_str());
    ThrowErrno(error, "truncate", *temporary);
  }
}

fs::path PathOfTemporary(const fs::path& temporary) {
  if (temporary.extension() != ".tmp") return {};
  const fs::path numbered = temporary.parent_path() / temporary.stem();
  const std::string pid = numbered.extension();
  if (pid.size() < 2 || pid.find_first_not_of("0123456789", 1) != pid.npos) return {};
  return numbered.parent_path() / numbered.stem();
}

void RemoveLeftovers(const fs::path& path) {
  const fs::path folder = path.has_parent_path() ? path.parent_path() : fs::path(".");
  std::vector<fs::path> left;
  std::error_code error;  // who writes there sees it, too
  fs::directory_iterator entry(folder, error);
  for (; !error && entry != fs::directory_iterator(); entry.increment(error)) {
    const fs::path of = PathOfTemporary(entry->path());
    if (!of.empty() && of.filename() == path.filename()) left.push_back(entry->path());
  }
  for (const fs::path& temporary : left) RemoveUnlessLocked(temporary);
}

}  // namespace routecast
