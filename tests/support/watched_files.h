// Every file call that this process makes below a folder, whoever makes it (our writers,
// std::filesystem, RocksDB): counted, failed on request, and written down so that the
// disk after a power loss can be made. A test that links watched_files.cc has its calls
// to libc replaced; without a Watch they go on unchanged.
// Thread rule: calls may come from any thread; one Watch at a time.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "common/files.h"

namespace routecast {

enum class FileCall {
  kOpen,    // of what is there, to read or write
  kCreate,  // open that makes a file
  kRead,
  kWrite,
  kSync,
  kTruncate,
  kRename,
  kExchange,  // renameat2 that swaps two names
  kLink,
  kUnlink,
  kMakeFolder,
};
const char* FileCallName(FileCall call);

enum class Fault {
  kNone,
  kIoError,     // the call fails with EIO, later ones work
  kNoSpace,     // this call and all later ones that need room fail with ENOSPC
  kCutWrite,    // the write takes half of its bytes, then as kNoSpace
  kPartial,     // the write takes half of its bytes, the rest may follow
  kNoExchange,  // swapping names is refused, as by file systems that cannot
};
// Whether `fault` means something at such a call.
bool Applies(Fault fault, FileCall call);

struct SeenCall {
  FileCall call;
  std::string path;  // below the watched folder
};

// The disk as it may be after a power loss, by path below the watched folder.
struct DiskState {
  std::map<std::string, std::string> files;
  std::vector<std::string> folders;  // parents first
  void WriteTo(const fs::path& folder) const;
  bool operator==(const DiskState&) const = default;
};

enum class Lost {
  kUnsynced,       // bytes and names that no fsync (of file, of folder) has secured
  kUnsyncedBytes,  // the bytes only: names reached the disk ahead of them
  kNothing         // the process was killed, the machine lives
};

class FileWatch {
 public:
  // Watches calls below `folder` (empty or absent) until destroyed; syncs are not carried
  // out. Call number `at` (from 0) gets `fault`.
  explicit FileWatch(const fs::path& folder, int64_t at = -1, Fault fault = Fault::kNone);
  ~FileWatch();
  FileWatch(const FileWatch&) = delete;
  FileWatch& operator=(const FileWatch&) = delete;

  const std::vector<SeenCall>& calls() const;
  bool fired() const;  // the fault has happened
  // Disks after a power loss (or kill) between any two calls, consecutive equal ones
  // once. `promises` gets, for each, how often Promise() had been called by then.
  std::vector<DiskState> PowerLosses(Lost lost, std::vector<int>* promises) const;
  // Marks a point of the job at which it has promised something to be durable.
  void Promise();

  struct State;

 private:
  std::unique_ptr<State> state_;
};

}  // namespace routecast
