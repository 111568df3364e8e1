// Exclusive use of the place where a new store is built (OUT.tmp).
// Thread rule: one owner.
#pragma once

#include "common/files.h"

namespace routecast {

// Holds OUT.tmp.lock, as long as it lives, by flock: a process that is gone holds
// nothing. Then the file is gone as well; after a kill it stays, for the next to take.
// Where the file system has no locks, nobody is kept out.
class BuildLock {
 public:
  // EnvironmentError where another process builds `out`.
  explicit BuildLock(const fs::path& out);
  ~BuildLock();
  BuildLock(const BuildLock&) = delete;
  BuildLock& operator=(const BuildLock&) = delete;

 private:
  fs::path path_;
  int fd_ = -1;
};

}  // namespace routecast
