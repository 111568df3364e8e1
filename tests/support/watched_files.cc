// The functions at the end replace libc's in the whole process, shared libraries
// included: the dynamic linker finds the program's first.
#include "tests/support/watched_files.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <mutex>
#include <optional>

#include "tests/support/simulated_disk.h"

namespace routecast {

struct FileWatch::State {
  std::string root;
  int64_t at = -1;
  Fault fault = Fault::kNone;
  bool fired = false, full = false;
  std::mutex mutex;
  std::vector<SeenCall> calls;
  std::vector<FileChange> changes;
  struct Open {
    int64_t number;
    std::string path;
  };
  std::map<int, Open> open;  // by descriptor
  std::map<const void*, std::string> streams;
  int64_t opened = 0;

  // The path below the watched folder; nothing where it is elsewhere.
  std::optional<std::string> Below(const char* path) const {
    const std::string name = fs::absolute(path).lexically_normal().string();
    if (name == root || name == root + "/") return "";
    if (name.rfind(root + "/", 0) != 0) return std::nullopt;
    std::string below = name.substr(root.size() + 1);
    if (!below.empty() && below.back() == '/') below.pop_back();
    return below;
  }

  // Counts a call. True where it must fail, with errno set; `*cut` where it is a write
  // that takes half of its bytes.
  bool Meet(FileCall call, const std::string& path, bool* cut = nullptr) {
    const auto number = static_cast<int64_t>(calls.size());
    calls.push_back({call, path});
    if (full && Applies(Fault::kNoSpace, call)) {
      errno = ENOSPC;
      return true;
    }
    if (number != at || fault == Fault::kNone) return false;
    fired = true;
    full = fault == Fault::kNoSpace || fault == Fault::kCutWrite;
    if ((fault == Fault::kCutWrite || fault == Fault::kPartial) && cut != nullptr) {
      *cut = true;
      return false;
    }
    errno = fault == Fault::kNoSpace      ? ENOSPC
            : fault == Fault::kNoExchange ? EINVAL
                                          : EIO;
    return true;
  }
};

namespace {

std::atomic<FileWatch::State*> watching{nullptr};

// The libc function that ours hides.
#define ROUTECAST_REAL(name) \
  static const auto real = reinterpret_cast<decltype(&::name)>(dlsym(RTLD_NEXT, #name))

std::string AtDescriptor(int folder, const char* path) {
  if (folder == AT_FDCWD || path[0] == '/') return path;
  char name[4096];
  const ssize_t n =
      ::readlink(("/proc/self/fd/" + std::to_string(folder)).c_str(), name, sizeof name);
  return n <= 0 ? path : std::string(name, static_cast<size_t>(n)) + "/" + path;
}

// open() with what it does to files written down. `real` opens.
template <typename RealOpen>
int WatchedOpen(const std::string& path, int flags, const RealOpen& real) {
  FileWatch::State* s = watching.load();
  if (s == nullptr) return real();
  const auto below = s->Below(path.c_str());
  if (!below) return real();
  const std::lock_guard lock(s->mutex);
  struct stat info;
  const bool there = ::stat(path.c_str(), &info) == 0;
  const bool creates = !there && (flags & O_CREAT) != 0;
  if (s->Meet(creates ? FileCall::kCreate : FileCall::kOpen, *below)) return -1;
  const int fd = real();
  if (fd < 0) return fd;
  const int64_t number = s->opened++;
  s->open[fd] = {number, *below};
  s->changes.push_back({FileChange::kCreate, *below, "", number, 0, ""});
  if (there && (flags & O_TRUNC) != 0) {
    s->changes.push_back({FileChange::kTruncate, *below, "", number, 0, ""});
  }
  return fd;
}

template <typename RealWrite>
ssize_t WatchedWrite(int fd, const void* bytes, size_t count, int64_t offset,
                     const RealWrite& real) {
  FileWatch::State* s = watching.load();
  if (s == nullptr) return real(count);
  const std::lock_guard lock(s->mutex);
  const auto file = s->open.find(fd);
  if (file == s->open.end()) return real(count);
  bool cut = false;
  if (s->Meet(FileCall::kWrite, file->second.path, &cut)) return -1;
  if (offset < 0) {
    const bool append = (::fcntl(fd, F_GETFL) & O_APPEND) != 0;
    offset = ::lseek(fd, 0, append ? SEEK_END : SEEK_CUR);
  }
  const ssize_t n = real(cut && count > 1 ? count / 2 : count);
  if (n > 0) {
    s->changes.push_back(
        {FileChange::kWrite, file->second.path, "", file->second.number,
         static_cast<uint64_t>(offset),
         std::string(static_cast<const char*>(bytes), static_cast<size_t>(n))});
  }
  return n;
}

// Calls on an open file that change nothing which must be written down.
template <typename RealCall>
auto WatchedRead(int fd, const RealCall& real) -> decltype(real()) {
  FileWatch::State* s = watching.load();
  if (s != nullptr) {
    const std::lock_guard lock(s->mutex);
    const auto file = s->open.find(fd);
    if (file != s->open.end() && s->Meet(FileCall::kRead, file->second.path)) return -1;
  }
  return real();
}

template <typename RealSync>
int WatchedSync(int fd, const RealSync& real) {
  FileWatch::State* s = watching.load();
  if (s == nullptr) return real();
  const std::lock_guard lock(s->mutex);
  const auto file = s->open.find(fd);
  if (file == s->open.end()) return real();
  if (s->Meet(FileCall::kSync, file->second.path)) return -1;
  s->changes.push_back(
      {FileChange::kSync, file->second.path, "", file->second.number, 0, ""});
  return 0;
}

// A call on one or two names.
template <typename RealCall>
int WatchedName(FileCall call, FileChange::Kind kind, const std::string& from,
                const char* to, const RealCall& real) {
  FileWatch::State* s = watching.load();
  if (s == nullptr) return real();
  const auto below = s->Below(from.c_str());
  const auto other = to ? s->Below(to) : std::optional<std::string>("");
  if (!below || !other) return real();
  const std::lock_guard lock(s->mutex);
  if (s->Meet(call, *below)) return -1;
  const int result = real();
  if (result == 0) s->changes.push_back({kind, *below, *other, 0, 0, ""});
  return result;
}

}  // namespace

const char* FileCallName(FileCall call) {
  constexpr const char* kNames[] = {"open", "create",   "read",   "write",
                                    "sync", "truncate", "rename", "exchange",
                                    "link", "unlink",   "mkdir"};
  return kNames[static_cast<int>(call)];
}

bool Applies(Fault fault, FileCall call) {
  switch (fault) {
    case Fault::kNone:
      return false;
    case Fault::kIoError:
      return true;
    case Fault::kCutWrite:
    case Fault::kPartial:
      return call == FileCall::kWrite;
    case Fault::kNoExchange:
      return call == FileCall::kExchange;
    case Fault::kNoSpace:
      return call == FileCall::kCreate || call == FileCall::kWrite ||
             call == FileCall::kSync || call == FileCall::kRename ||
             call == FileCall::kExchange || call == FileCall::kLink ||
             call == FileCall::kMakeFolder;
  }
  return false;
}

FileWatch::FileWatch(const fs::path& folder, int64_t at, Fault fault)
    : state_(std::make_unique<State>()) {
  state_->root = fs::absolute(folder).lexically_normal().string();
  state_->at = at;
  state_->fault = fault;
  watching = state_.get();
}

FileWatch::~FileWatch() { watching = nullptr; }

const std::vector<SeenCall>& FileWatch::calls() const { return state_->calls; }
bool FileWatch::fired() const { return state_->fired; }

void FileWatch::Promise() {
  const std::lock_guard lock(state_->mutex);
  state_->changes.push_back({FileChange::kPromise, "", "", 0, 0, ""});
}

std::vector<DiskState> FileWatch::PowerLosses(Lost lost,
                                              std::vector<int>* promises) const {
  std::vector<DiskState> states;
  SimulatedDisk disk;
  int promised = 0;
  promises->clear();
  for (const FileChange& change : state_->changes) {
    disk.Apply(change);
    promised += change.kind == FileChange::kPromise;
    DiskState state = disk.After(lost);
    if (states.empty() || !(states.back() == state)) {
      states.push_back(std::move(state));
      promises->push_back(promised);
    }
    promises->back() = promised;  // the same disk must keep the later promise as well
  }
  return states;
}

}  // namespace routecast

// --- what replaces libc's -----------------------------------------------------------

using routecast::FileCall;
using routecast::FileChange;

extern "C" {

int open(const char* path, int flags, ...) {
  ROUTECAST_REAL(open);
  va_list arguments;
  va_start(arguments, flags);
  const auto mode = (flags & O_CREAT) ? va_arg(arguments, mode_t) : mode_t{0};
  va_end(arguments);
  return routecast::WatchedOpen(path, flags, [&] { return real(path, flags, mode); });
}

int openat(int folder, const char* path, int flags, ...) {
  ROUTECAST_REAL(openat);
  va_list arguments;
  va_start(arguments, flags);
  const auto mode = (flags & O_CREAT) ? va_arg(arguments, mode_t) : mode_t{0};
  va_end(arguments);
  return real(folder, path, flags, mode);  // std::filesystem lists folders with it
}

FILE* fopen(const char* path, const char* mode) {
  ROUTECAST_REAL(fopen);
  routecast::FileWatch::State* s = routecast::watching.load();
  const auto below = s ? s->Below(path) : std::nullopt;
  if (!below || mode[0] != 'r') return real(path, mode);
  const std::lock_guard lock(s->mutex);
  if (s->Meet(FileCall::kOpen, *below)) return nullptr;
  FILE* file = real(path, mode);
  if (file != nullptr) s->streams[file] = *below;
  return file;
}

size_t fread_unlocked(void* to, size_t size, size_t count, FILE* file) {
  ROUTECAST_REAL(fread_unlocked);
  if (routecast::FileWatch::State* s = routecast::watching.load()) {
    const std::lock_guard lock(s->mutex);
    const auto found = s->streams.find(file);
    // 0 without end of file is an error to its callers.
    if (found != s->streams.end() && s->Meet(FileCall::kRead, found->second)) return 0;
  }
  return real(to, size, count, file);
}

int fclose(FILE* file) {
  ROUTECAST_REAL(fclose);
  if (routecast::FileWatch::State* s = routecast::watching.load()) {
    const std::lock_guard lock(s->mutex);
    s->streams.erase(file);
  }
  return real(file);
}

int close(int fd) {
  ROUTECAST_REAL(close);
  if (routecast::FileWatch::State* s = routecast::watching.load()) {
    const std::lock_guard lock(s->mutex);
    s->open.erase(fd);
  }
  return real(fd);
}

ssize_t read(int fd, void* to, size_t count) {
  ROUTECAST_REAL(read);
  return routecast::WatchedRead(fd, [&] { return real(fd, to, count); });
}

ssize_t pread(int fd, void* to, size_t count, off_t offset) {
  ROUTECAST_REAL(pread);
  return routecast::WatchedRead(fd, [&] { return real(fd, to, count, offset); });
}

ssize_t write(int fd, const void* from, size_t count) {
  ROUTECAST_REAL(write);
  return routecast::WatchedWrite(fd, from, count, -1,
                                 [&](size_t n) { return real(fd, from, n); });
}

ssize_t pwrite(int fd, const void* from, size_t count, off_t offset) {
  ROUTECAST_REAL(pwrite);
  return routecast::WatchedWrite(fd, from, count, offset,
                                 [&](size_t n) { return real(fd, from, n, offset); });
}

int fsync(int fd) {
  ROUTECAST_REAL(fsync);
  return routecast::WatchedSync(fd, [&] { return real(fd); });
}

int fdatasync(int fd) {
  ROUTECAST_REAL(fdatasync);
  return routecast::WatchedSync(fd, [&] { return real(fd); });
}

int ftruncate(int fd, off_t size) {
  ROUTECAST_REAL(ftruncate);
  routecast::FileWatch::State* s = routecast::watching.load();
  if (s == nullptr) return real(fd, size);
  const std::lock_guard lock(s->mutex);
  const auto file = s->open.find(fd);
  if (file == s->open.end()) return real(fd, size);
  if (s->Meet(FileCall::kTruncate, file->second.path)) return -1;
  const int result = real(fd, size);
  if (result == 0) {
    s->changes.push_back({FileChange::kTruncate, file->second.path, "",
                          file->second.number, static_cast<uint64_t>(size), ""});
  }
  return result;
}

int rename(const char* from, const char* to) {
  ROUTECAST_REAL(rename);
  return routecast::WatchedName(FileCall::kRename, FileChange::kRename, from, to,
                                [&] { return real(from, to); });
}

int renameat2(int from_folder, const char* from, int to_folder, const char* to,
              unsigned flags) {
  ROUTECAST_REAL(renameat2);
  const bool swaps = (flags & RENAME_EXCHANGE) != 0;
  return routecast::WatchedName(swaps ? FileCall::kExchange : FileCall::kRename,
                                swaps ? FileChange::kExchange : FileChange::kRename,
                                routecast::AtDescriptor(from_folder, from),
                                routecast::AtDescriptor(to_folder, to).c_str(), [&] {
                                  return real(from_folder, from, to_folder, to, flags);
                                });
}

int link(const char* from, const char* to) {
  ROUTECAST_REAL(link);
  return routecast::WatchedName(FileCall::kLink, FileChange::kLink, from, to,
                                [&] { return real(from, to); });
}

int unlink(const char* path) {
  ROUTECAST_REAL(unlink);
  return routecast::WatchedName(FileCall::kUnlink, FileChange::kUnlink, path, nullptr,
                                [&] { return real(path); });
}

int unlinkat(int folder, const char* path, int flags) {
  ROUTECAST_REAL(unlinkat);
  return routecast::WatchedName(FileCall::kUnlink, FileChange::kUnlink,
                                routecast::AtDescriptor(folder, path), nullptr,
                                [&] { return real(folder, path, flags); });
}

int rmdir(const char* path) {
  ROUTECAST_REAL(rmdir);
  return routecast::WatchedName(FileCall::kUnlink, FileChange::kUnlink, path, nullptr,
                                [&] { return real(path); });
}

int remove(const char* path) {
  ROUTECAST_REAL(remove);
  return routecast::WatchedName(FileCall::kUnlink, FileChange::kUnlink, path, nullptr,
                                [&] { return real(path); });
}

int mkdir(const char* path, mode_t mode) {
  ROUTECAST_REAL(mkdir);
  return routecast::WatchedName(FileCall::kMakeFolder, FileChange::kMakeFolder, path,
                                nullptr, [&] { return real(path, mode); });
}

}  // extern "C"
