#include "evaluator/disk_sweep.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <thread>

#include "common/errors.h"
#include "common/progress.h"
#include "common/stop.h"
#include "evaluator/expert_tiers.h"
#include "evaluator/host_pages.h"

namespace routecast {
namespace {

constexpr uint64_t kPage = 4096;
constexpr int kFewestRepeats = 5, kMostRepeats = 200;
constexpr uint64_t kStreamBytes = 256 << 20;  // larger than any cache
constexpr double kFullRate = 0.9;

double Seconds(std::chrono::steady_clock::time_point since) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - since).count();
}

double Quantile(std::vector<double> values, double q) {
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(q * static_cast<double>(values.size() - 1))];
}

// Sums memory up, again and again, until it is told to stop: what computing with a batch
// of one does to a machine.
class MemoryStream {
 public:
  MemoryStream() : pages_(kStreamBytes), thread_([this] { Run(); }) {}
  ~MemoryStream() {
    stop_ = true;
    thread_.join();
  }
  // Bytes a second since the last call.
  double Rate() {
    const double now = Seconds(start_), moved = static_cast<double>(moved_.exchange(0));
    const double seconds = now - last_;
    last_ = now;
    return seconds > 0 ? moved / seconds : 0;
  }

 private:
  void Run() {
    const auto* words = reinterpret_cast<const uint64_t*>(pages_.data());
    constexpr uint64_t kPart = 1 << 20;
    for (uint64_t at = 0; !stop_; at = (at + kPart) % kStreamBytes) {
      uint64_t sum = 0;
      for (uint64_t i = 0; i < kPart / 8; ++i) sum += words[at / 8 + i];
      sink_ = sum;
      moved_ += kPart;
    }
  }
  HostPages pages_;
  std::atomic<bool> stop_{false};
  std::atomic<uint64_t> moved_{0};
  volatile uint64_t sink_ = 0;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  double last_ = 0;
  std::thread thread_;  // last: it runs as soon as it is made
};

class ScratchFile {
 public:
  ScratchFile(const fs::path& folder, uint64_t bytes,
              const std::string& what = "transfer")
      : bytes_(bytes) {
    MakeFolder(folder);
    path_ = folder / (what + "-" + std::to_string(::getpid()) + ".tmp");
    const int fd = ::open(path_.c_str(), O_CREAT | O_EXCL | O_WRONLY, 0600);
    if (fd < 0) ThrowErrno(errno, "cannot create", path_.string());
    std::vector<uint64_t> block((1 << 20) / 8);
    for (uint64_t at = 0; at < bytes; at += 1 << 20) {
      for (size_t i = 0; i < block.size(); ++i)
        block[i] = at * 31 + i * 0x9e3779b97f4aULL;
      if (::pwrite(fd, block.data(), 1 << 20, static_cast<off_t>(at)) != 1 << 20) {
        const int error = errno;
        ::close(fd);
        ::unlink(path_.c_str());
        ThrowErrno(error, "cannot write", path_.string());
      }
    }
    ::fsync(fd);
    ::close(fd);
  }
  ~ScratchFile() { ::unlink(path_.c_str()); }
  ScratchFile(const ScratchFile&) = delete;
  ScratchFile& operator=(const ScratchFile&) = delete;
  const fs::path& path() const { return path_; }
  uint64_t bytes() const { return bytes_; }

 private:
  fs::path path_;
  uint64_t bytes_;
};

// Writes over a file of its own, again and again, until it goes.
class WriteStream {
 public:
  WriteStream(const fs::path& folder, bool direct)
      : file_(folder, kFileBytes, "written"),
        fd_(::open(file_.path().c_str(), O_WRONLY | (direct ? O_DIRECT : 0))),
        pages_(kBlockBytes) {
    if (fd_ < 0) ThrowErrno(errno, "open", file_.path());
    thread_ = std::thread([this] { Run(); });
  }
  ~WriteStream() { Stop(); }
  WriteStream(const WriteStream&) = delete;
  WriteStream& operator=(const WriteStream&) = delete;
  // EnvironmentError where a write failed: then nothing was measured.
  void End() {
    Stop();
    if (error_ != 0) ThrowErrno(error_, "write", file_.path());
  }

 private:
  static constexpr uint64_t kFileBytes = 64 << 20, kBlockBytes = 4 << 20;
  void Run() {
    for (uint64_t at = 0; !stop_; at = (at + kBlockBytes) % kFileBytes) {
      const ssize_t put =
          ::pwrite(fd_, pages_.data(), kBlockBytes, static_cast<off_t>(at));
      if (put < 0 && errno == EINTR) continue;
      if (put != static_cast<ssize_t>(kBlockBytes)) {
        error_ = put < 0 ? errno : EIO;
        return;
      }
      if (at + kBlockBytes == kFileBytes) ::fdatasync(fd_);
    }
  }
  void Stop() {
    stop_ = true;
    if (!thread_.joinable()) return;
    thread_.join();
    ::close(fd_);
  }
  ScratchFile file_;
  int fd_;
  HostPages pages_;
  std::atomic<bool> stop_{false};
  std::atomic<int> error_{0};
  std::thread thread_;
};

// One transfer: `bytes` at `offset`, by threads that take a part each.
class Reader {
 public:
  // False from ok() where the file system refuses direct reads.
  Reader(const ScratchFile& file, bool direct)
      : fd_(::open(file.path().c_str(), O_RDONLY | (direct ? O_DIRECT : 0))) {}
  ~Reader() {
    if (fd_ >= 0) ::close(fd_);
  }
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;
  bool ok() const { return fd_ >= 0; }
  double Transfer(uint64_t offset, uint64_t bytes, int threads, std::byte* to) const {
    const auto start = std::chrono::steady_clock::now();
    const auto part = [&](int i) {
      const uint64_t each = bytes / static_cast<uint64_t>(threads) / kPage * kPage;
      const uint64_t from = each * static_cast<uint64_t>(i);
      const uint64_t end = i + 1 == threads ? bytes : from + each;
      for (uint64_t at = from; at < end;) {
        const ssize_t got =
            ::pread(fd_, to + at, end - at, static_cast<off_t>(offset + at));
        if (got <= 0) {
          failed_ = true;
          return;
        }
        at += static_cast<uint64_t>(got);
      }
    };
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(part, i);
    part(0);
    for (std::thread& t : others) t.join();
    if (failed_) throw EnvironmentError("a scratch file cannot be read back");
    return Seconds(start);
  }

 private:
  int fd_;
  mutable std::atomic<bool> failed_{false};
};

TransferPoint MeasurePoint(const Reader& reader, const ScratchFile& file,
                           HostPages* pages, TransferPoint point, double seconds) {
  std::vector<double> times;
  uint64_t offset = 0;
  const auto start = std::chrono::steady_clock::now();
  while (static_cast<int>(times.size()) < kFewestRepeats ||
         (Seconds(start) < seconds && static_cast<int>(times.size()) < kMostRepeats)) {
    ThrowIfStopped("while reading the scratch file");
    if (offset + point.bytes > file.bytes()) offset = 0;
    times.push_back(reader.Transfer(offset, point.bytes, point.threads, pages->data()));
    offset += (point.bytes + kPage - 1) / kPage * kPage;
  }
  point.seconds = Quantile(times, 0.5);
  point.spread = Quantile(times, 0.75) - Quantile(times, 0.25);
  point.repeats = static_cast<int>(times.size());
  return point;
}

std::vector<uint64_t> Sizes(const DiskSweepOptions& options) {
  std::vector<uint64_t> sizes;
  for (uint64_t s = options.smallest; s <= std::min(options.largest, options.file_bytes);
       s *= 4) {
    sizes.push_back(s);
  }
  return sizes;
}

}  // namespace

void ConcludeDisk(DeviceProfile* profile) {
  const std::vector<TransferPoint>& sweep = profile->sweep;
  const bool direct = std::any_of(sweep.begin(), sweep.end(),
                                  [](const TransferPoint& p) { return p.direct; });
  const auto counts = [&](const TransferPoint& p) {
    return !p.with_compute && !p.both_ways && p.direct == direct;
  };
  const TransferPoint* best = nullptr;
  for (const TransferPoint& p : sweep) {
    if (!counts(p)) continue;
    if (!best || p.bytes_per_second() > best->bytes_per_second()) best = &p;
  }
  std::vector<TransferPoint> line;
  for (const TransferPoint& p : sweep) {
    if (counts(p) && p.threads == best->threads) line.push_back(p);
  }
  FitLink(line, &profile->link_fixed_seconds, &profile->link_bytes_per_second);
  for (const TransferPoint& p : line) {
    if (p.bytes_per_second() < kFullRate * best->bytes_per_second()) continue;
    if (profile->bytes_at_90_percent == 0 || p.bytes < profile->bytes_at_90_percent) {
      profile->bytes_at_90_percent = p.bytes;
    }
  }
}

DeviceProfile MeasureDisk(const DiskSweepOptions& options) {
  const ScratchFile file(options.folder, options.file_bytes);
  HostPages pages(std::min(options.largest, options.file_bytes));
  DeviceProfile profile;
  profile.name = "this machine's disk, below " + options.folder.string();
  profile.cpu = true;
  profile.memory_bytes = FreeFastBytes({});
  double alone = 0, beside = 0;
  {
    MemoryStream stream;
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    stream.Rate();
    std::this_thread::sleep_for(std::chrono::duration<double>(options.seconds_a_point));
    alone = stream.Rate();
  }
  profile.memory_bytes_per_second = alone;
  const auto sizes = Sizes(options);
  const std::vector<int> threads = {1, 2, 4};
  Progress progress("transfers", "points", 2 * sizes.size() * threads.size() + 4,
                    options.quiet);
  uint64_t done = 0;
  for (const bool direct : {true, false}) {
    const Reader reader(file, direct);
    if (!reader.ok()) continue;  // the file system has no direct reads
    for (const int n : threads) {
      for (const uint64_t bytes : sizes) {
        profile.sweep.push_back(MeasurePoint(
            reader, file, &pages, {bytes, n, direct, false}, options.seconds_a_point));
        progress.Update(++done);
      }
    }
    {
      MemoryStream stream;
      stream.Rate();
      profile.sweep.push_back(MeasurePoint(reader, file, &pages,
                                           {sizes.back(), 2, direct, true},
                                           options.seconds_a_point));
      if (direct || beside == 0) beside = stream.Rate();
      progress.Update(++done);
    }
    WriteStream writes(options.folder, direct);
    TransferPoint both{sizes.back(), 2, direct, false};
    both.both_ways = true;
    both = MeasurePoint(reader, file, &pages, both, options.seconds_a_point);
    writes.End();
    profile.sweep.push_back(both);
    progress.Update(++done);
  }
  progress.Finish();
  profile.memory_share_with_transfers = std::min(1.0, beside / alone);
  ConcludeDisk(&profile);
  return profile;
}

}  // namespace routecast
