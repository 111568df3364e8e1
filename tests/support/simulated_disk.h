// A model of what a POSIX file system may have on its disk: a file's bytes are there
// after fsync of the file, a name after fsync of its folder.
// Thread rule: one thread.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "tests/support/watched_files.h"

namespace routecast {

// One call that changed files. Paths are below the watched folder; "" is the folder.
struct FileChange {
  enum Kind {
    kCreate,
    kWrite,
    kTruncate,
    kSync,
    kMakeFolder,
    kRename,
    kExchange,
    kLink,
    kUnlink,
    kPromise
  } kind;
  std::string path;     // of the open file: the name under which it was opened
  std::string other;    // rename, exchange, link: the new name
  int64_t file = 0;     // create, write, truncate, sync: number of the open file
  uint64_t offset = 0;  // write; truncate: the new size
  std::string bytes;
};

class SimulatedDisk {
 public:
  SimulatedDisk();
  void Apply(const FileChange& change);
  DiskState After(Lost lost) const;

 private:
  struct Node {
    bool folder = false;
    std::string bytes, safe_bytes;
    std::map<std::string, std::shared_ptr<Node>> names, safe_names;
  };
  using NodePtr = std::shared_ptr<Node>;
  NodePtr At(const std::string& path) const;  // null where nothing is
  NodePtr ParentOf(const std::string& path) const;
  static void Collect(const Node& node, const std::string& path, Lost lost,
                      DiskState* state);

  NodePtr root_;
  std::map<int64_t, NodePtr> open_;
};

}  // namespace routecast
