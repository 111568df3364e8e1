#include "storage/store_lock.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <ctime>

#include "common/errors.h"
#include "common/run_record.h"

namespace routecast {
namespace {

constexpr int kStaleSeconds = 120;

std::string HostName() {
  char host[256] = "unknown";
  ::gethostname(host, sizeof host - 1);
  return host;
}

// Start time of a process in clock ticks since boot: tells a reused pid from the old one.
// Empty when there is no such process.
std::string ProcessStart(int64_t pid) {
  const fs::path path = "/proc/" + std::to_string(pid) + "/stat";
  std::ifstream in(path);
  std::string text((std::istreambuf_iterator<char>(in)),
                   std::istreambuf_iterator<char>());
  size_t at = text.rfind(')');  // the name before it may hold spaces
  if (at == std::string::npos) return "";
  for (int field = 2; field < 22 && at != std::string::npos; ++field) {
    at = text.find(' ', at + 1);
  }
  return at == std::string::npos ? ""
                                 : text.substr(at + 1, text.find(' ', at + 1) - at - 1);
}

// Serialises the few lines that look at and replace a lock file.
class Guard {
 public:
  explicit Guard(const fs::path& path)
      : fd_(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644)) {
    if (fd_ < 0) ThrowErrno(errno, "open", path);
    while (::flock(fd_, LOCK_EX) != 0) {
      if (errno != EINTR) ThrowErrno(errno, "lock", path);
    }
  }
  ~Guard() { ::close(fd_); }
  // Now, by the clock that heartbeats are written with: of a network file system the
  // server's, which this host's may differ from.
  std::time_t Now() const {
    struct stat info;
    if (::futimens(fd_, nullptr) != 0 || ::fstat(fd_, &info) != 0) {
      return std::time(nullptr);
    }
    return info.st_mtim.tv_sec;
  }

 private:
  int fd_;
};

// Who holds the lock, or "" when whoever took it is gone. Where that cannot be seen it is
// an error: a living holder's store must not be taken.
std::string LivingHolder(const fs::path& path, std::time_t now) {
  struct stat info;
  if (::stat(path.c_str(), &info) != 0) {
    if (errno == ELOOP) {  // nobody named this file: the path is not what is wrong
      throw EnvironmentError(ErrorText("stat failed: " + path.string(),
                                       std::strerror(errno), "look at that file"));
    }
    if (errno != ENOENT) ThrowErrno(errno, "stat", path);
    return "";
  }
  std::string host, start, job;
  int64_t pid = 0;
  try {
    const Json lock = ReadJsonFile(path);
    host = lock.value("host", "");
    start = lock.value("process_start", "");
    job = lock.value("job", "");
    pid = lock.value("pid", int64_t{0});
  } catch (const DataError&) {
    return "";  // its write is atomic: unreadable means a crash of the machine
  } catch (const Json::exception&) {
    return "";
  }
  const int64_t age = now - info.st_mtim.tv_sec;
  const bool alive = host == HostName() ? !start.empty() && ProcessStart(pid) == start
                                        : age < kStaleSeconds;
  if (!alive) return "";
  return "host " + host + ", process " + std::to_string(pid) + ", job \"" + job +
         "\", heartbeat " + std::to_string(age) + " s ago";
}

// Whether the lock is that of the job `token`. Not where there is none: whoever took it
// over has ended since. Throws where that cannot be seen.
bool IsOf(const fs::path& path, const std::string& token) {
  for (bool again = false;; again = true) {
    try {
      const Json lock = ReadJsonFile(path);
      return lock.is_object() && lock.value("token", Json()) == token;
    } catch (const std::exception&) {
      if (::access(path.c_str(), F_OK) == 0 || errno != ENOENT) throw;
    }
    if (again) return false;
    // A network file system may remember for a while that there was none; of a folder
    // that is opened it asks its server.
    ::close(::open(path.parent_path().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  }
}

std::string LostText(const fs::path& store) {
  return ErrorText(store.string() + " was taken over by another job",
                   "this one stood still for more than " + std::to_string(kStaleSeconds) +
                       " s, or lock.json was removed",
                   "let the other finish, or start this one again after it");
}

}  // namespace

std::string StoreHolder(const fs::path& store) {
  return LivingHolder(store / "lock.json", std::time(nullptr));
}

StoreLock::StoreLock(const fs::path& store,
                     std::function<void(const std::string&)> on_lost,
                     std::chrono::milliseconds heartbeat)
    : path_(store / "lock.json"), on_lost_(std::move(on_lost)), period_(heartbeat) {
  const Guard guard(store / "lock.guard");
  const std::string holder = LivingHolder(path_, guard.Now());
  if (!holder.empty()) {
    throw EnvironmentError(ErrorText(store.string() + " is in use by another job", holder,
                                     "wait for it, or stop it and start again"));
  }
  const char* job = std::getenv("SLURM_JOB_ID");
  const int64_t pid = ::getpid();
  const auto now = std::chrono::system_clock::now().time_since_epoch().count();
  token_ =
      Hex64(Hash64(HostName() + ":" + std::to_string(pid) + ":" + std::to_string(now)));
  const Json lock = {{"host", HostName()},
                     {"pid", pid},
                     {"process_start", ProcessStart(pid)},
                     {"job", job ? job : ""},
                     {"token", token_}};
  try {
    WriteFileAtomic(path_, lock.dump(2) + "\n");
  } catch (...) {
    // It may have its name already: nobody holds a lock whose taking failed.
    std::error_code ignored;
    fs::remove(path_, ignored);
    throw;
  }
  heartbeat_ = std::thread([this] { Beat(); });
}

StoreLock::~StoreLock() {
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
  }
  wake_.notify_all();
  heartbeat_.join();
  try {
    const Guard guard(path_.parent_path() / "lock.guard");
    if (IsOwn()) fs::remove(path_);
  } catch (const std::exception&) {  // who comes next sees that its holder is gone
  }
}

// A job that stood still for longer than its heartbeat holds may find another's lock.
bool StoreLock::IsOwn() const { return IsOf(path_, token_); }

void StoreLock::RequireHeld(const fs::path& store, const std::string& token) {
  if (!IsOf(store / "lock.json", token)) throw EnvironmentError(LostText(store));
}

void StoreLock::Beat() {
  std::unique_lock lock(mutex_);
  while (!wake_.wait_for(lock, period_, [this] { return ending_; })) {
    try {
      if (IsOwn()) {
        ::utimensat(AT_FDCWD, path_.c_str(), nullptr, 0);
        continue;
      }
    } catch (const std::exception&) {  // unreadable: not to be renewed
      continue;
    }
    if (on_lost_) on_lost_(LostText(path_.parent_path()));
    return;
  }
}

}  // namespace routecast
