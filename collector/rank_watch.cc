#include "collector/rank_watch.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <ctime>

#include "collector/life_signs.h"
#include "common/errors.h"

namespace routecast {
namespace {

constexpr std::chrono::duration<double> kLongestPeriod{2};
constexpr double kLooksALimit = 10;
constexpr double kOwnSleepPeriods = 3;
// Of a core: more than threads need that sleep and look now and then.
constexpr double kLeastShareOfACore = 0.02;

double SecondsOf(clockid_t clock) {
  struct timespec t {};
  ::clock_gettime(clock, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

std::string WhoAmI() {
  char host[256] = "unknown";
  ::gethostname(host, sizeof host - 1);
  return std::string("host ") + host + ", process " + std::to_string(::getpid());
}

constexpr int64_t kUnknown = -1, kGone = -2;

// Opened each time: a network file system then asks its server for the time.
int64_t BeatOf(const fs::path& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return errno == ENOENT ? kGone : kUnknown;
  struct stat info;
  const bool known = ::fstat(fd, &info) == 0;
  ::close(fd);
  return known ? int64_t{info.st_mtim.tv_sec} * 1'000'000'000 + info.st_mtim.tv_nsec
               : kUnknown;
}

std::string WhoIs(const fs::path& path) {
  try {
    return ReadFile(path, 1024);
  } catch (const std::runtime_error&) {
  } catch (const UsageError&) {
  }
  return "its file " + path.filename().string() + " is gone";
}

}  // namespace

RankWatch::RankWatch(const fs::path& folder, const std::string& token,
                     const RankInfo& rank, double limit_seconds,
                     std::function<void(const std::string&)> on_hang)
    : folder_(folder),
      token_(token),
      rank_(rank),
      limit_(limit_seconds),
      period_(std::min(kLongestPeriod, limit_ / kLooksALimit)),
      on_hang_(std::move(on_hang)) {
  if (rank_.world == 1) return;
  WriteFileAtomic(FileOf(rank_.rank), WhoAmI());
  const Clock::time_point now = Clock::now();
  for (int r = 0; r < rank_.world; ++r) {
    if (r != rank_.rank && (rank_.is_root() || r == 0)) peers_[r] = {-1, now};
  }
  thread_ = std::thread([this] { Run(); });
}

RankWatch::~RankWatch() {
  if (!thread_.joinable()) return;
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
  }
  wake_.notify_all();
  thread_.join();
  if (std::uncaught_exceptions() > exceptions_) return;  // it did not come to its end
  std::error_code ignored;
  fs::remove(FileOf(rank_.rank), ignored);
}

fs::path RankWatch::FileOf(int rank) const {
  return folder_ / ("alive-" + token_ + "-" + std::to_string(rank));
}

bool RankWatch::Advanced(std::chrono::duration<double> elapsed) {
  const uint64_t signs = LifeSigns();
  const double cpu =
      SecondsOf(CLOCK_PROCESS_CPUTIME_ID) - SecondsOf(CLOCK_THREAD_CPUTIME_ID);
  const bool advanced =
      signs != seen_signs_ || cpu - seen_cpu_ >= kLeastShareOfACore * elapsed.count();
  seen_signs_ = signs;
  seen_cpu_ = cpu;
  return advanced;
}

void RankWatch::Run() {
  const fs::path own = FileOf(rank_.rank);
  Clock::time_point last = Clock::now();
  std::unique_lock lock(mutex_);
  while (!wake_.wait_for(lock, period_, [this] { return ending_; })) {
    const Clock::time_point now = Clock::now();
    if (Advanced(now - last)) ::utimensat(AT_FDCWD, own.c_str(), nullptr, 0);
    // Where the whole job was stopped and goes on, nobody could beat meanwhile.
    if (now - last > kOwnSleepPeriods * period_) {
      for (auto& [r, peer] : peers_) peer.changed = now;
    }
    last = now;
    Look(now);
  }
}

void RankWatch::Look(Clock::time_point now) {
  for (auto& [r, peer] : peers_) {
    const int64_t beat = BeatOf(FileOf(r));
    // It has come to its end; rank 0 may go on for long.
    if (beat == kGone && peer.beat_ns >= 0) peer.changed = now;
    if (beat >= 0 && beat != peer.beat_ns) peer = {beat, now};
    const std::chrono::duration<double> silent = now - peer.changed;
    if (silent < limit_ || reported_) continue;
    reported_ = true;
    on_hang_(ErrorText("rank " + std::to_string(r) + " hangs",
                       WhoIs(FileOf(r)) + ": no sign of life for " +
                           std::to_string(static_cast<int>(silent.count())) + " s",
                       "look at that process or host, then start the same command "
                       "again"));
  }
}

}  // namespace routecast
