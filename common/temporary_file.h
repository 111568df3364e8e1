// Files that are written beside their place and renamed to it: PATH.PID.tmp becomes PATH.
// A writer whose process is killed leaves its file; the next of the same path removes it.
// Thread rule: free functions, safe from any thread on different paths.
#pragma once

#include "common/files.h"

namespace routecast {

// Makes the empty file PATH.PID.tmp, mode 0644, and returns its descriptor, to read and
// write, once what killed writers left of `path` is removed: a living one, here or on
// another host, holds a lock (flock) on its file, as the returned one is held. Where the
// file system has no locks, leftovers stay.
int OpenTemporary(const fs::path& path, fs::path* temporary);
// Removes them alone.
void RemoveLeftovers(const fs::path& path);
// Whether `path` still names the open file: who takes a lock on a file that its holder
// removes must ask.
bool HasName(int fd, const fs::path& path);
// What path's temporary file this is; empty where it is none.
fs::path PathOfTemporary(const fs::path& temporary);

}  // namespace routecast
