#include "evaluator/device_profile.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>

#include "common/errors.h"
#include "common/progress.h"
#include "report/table.h"

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

// Page-aligned memory that is there.
class Pages {
 public:
  explicit Pages(uint64_t bytes) : bytes_(bytes) {
    memory_ = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (memory_ == MAP_FAILED) {
      throw EnvironmentError(ErrorText("no memory for a transfer of this size",
                                       FormatBytes(bytes) + " wanted", "free some"));
    }
  }
  ~Pages() { ::munmap(memory_, bytes_); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  std::byte* data() const { return static_cast<std::byte*>(memory_); }

 private:
  void* memory_;
  uint64_t bytes_;
};

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
  Pages pages_;
  std::atomic<bool> stop_{false};
  std::atomic<uint64_t> moved_{0};
  volatile uint64_t sink_ = 0;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  double last_ = 0;
  std::thread thread_;  // last: it runs as soon as it is made
};

class ScratchFile {
 public:
  ScratchFile(const fs::path& folder, uint64_t bytes) : bytes_(bytes) {
    MakeFolder(folder);
    path_ = folder / ("transfer-" + std::to_string(::getpid()) + ".tmp");
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

TransferPoint MeasurePoint(const Reader& reader, const ScratchFile& file, Pages* pages,
                           TransferPoint point, double seconds) {
  std::vector<double> times;
  uint64_t offset = 0;
  const auto start = std::chrono::steady_clock::now();
  while (static_cast<int>(times.size()) < kFewestRepeats ||
         (Seconds(start) < seconds && static_cast<int>(times.size()) < kMostRepeats)) {
    if (offset + point.bytes > file.bytes()) offset = 0;
    times.push_back(reader.Transfer(offset, point.bytes, point.threads, pages->data()));
    offset += (point.bytes + kPage - 1) / kPage * kPage;
  }
  point.seconds = Quantile(times, 0.5);
  point.spread = Quantile(times, 0.75) - Quantile(times, 0.25);
  point.repeats = static_cast<int>(times.size());
  return point;
}

std::vector<uint64_t> Sizes(const TransferOptions& options) {
  std::vector<uint64_t> sizes;
  for (uint64_t s = options.smallest; s <= std::min(options.largest, options.file_bytes);
       s *= 4) {
    sizes.push_back(s);
  }
  return sizes;
}

void Conclude(DeviceProfile* profile) {
  // The way that is fastest for the largest transfers, alone.
  const TransferPoint* best = nullptr;
  for (const TransferPoint& p : profile->sweep) {
    if (p.with_compute) continue;
    if (!best || p.bytes_per_second() > best->bytes_per_second()) best = &p;
  }
  std::vector<TransferPoint> line;
  for (const TransferPoint& p : profile->sweep) {
    if (!p.with_compute && p.threads == best->threads && p.direct == best->direct) {
      line.push_back(p);
    }
  }
  FitLink(line, &profile->link_fixed_seconds, &profile->link_bytes_per_second);
  for (const TransferPoint& p : line) {
    if (p.bytes_per_second() < kFullRate * best->bytes_per_second()) continue;
    if (profile->bytes_at_90_percent == 0 || p.bytes < profile->bytes_at_90_percent) {
      profile->bytes_at_90_percent = p.bytes;
    }
  }
}

}  // namespace

void FitLink(const std::vector<TransferPoint>& points, double* fixed_seconds,
             double* bytes_per_second) {
  // Weights of 1 / seconds^2: small transfers count as much as large ones.
  double w = 0, wx = 0, wy = 0, wxx = 0, wxy = 0;
  for (const TransferPoint& p : points) {
    const double x = static_cast<double>(p.bytes), y = p.seconds;
    const double weight = 1 / (y * y);
    w += weight;
    wx += weight * x;
    wy += weight * y;
    wxx += weight * x * x;
    wxy += weight * x * y;
  }
  const double slope = (w * wxy - wx * wy) / (w * wxx - wx * wx);
  *fixed_seconds = std::max(0.0, (wy - slope * wx) / w);
  *bytes_per_second = 1 / slope;
}

DeviceProfile MeasureDisk(const TransferOptions& options) {
  const ScratchFile file(options.folder, options.file_bytes);
  Pages pages(std::min(options.largest, options.file_bytes));
  DeviceProfile profile;
  profile.name = "this machine's disk, below " + options.folder.string();
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
  Progress progress("transfers", "points", 2 * sizes.size() * threads.size() + 2,
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
    MemoryStream stream;
    stream.Rate();
    profile.sweep.push_back(MeasurePoint(
        reader, file, &pages, {sizes.back(), 2, direct, true}, options.seconds_a_point));
    if (direct || beside == 0) beside = stream.Rate();
    progress.Update(++done);
  }
  progress.Finish();
  profile.memory_share_with_transfers = std::min(1.0, beside / alone);
  Conclude(&profile);
  return profile;
}

Json DeviceProfile::ToJson() const {
  Json json = {{"name", name},
               {"emulated", emulated},
               {"link_bytes_per_second", link_bytes_per_second},
               {"link_fixed_seconds", link_fixed_seconds},
               {"memory_bytes_per_second", memory_bytes_per_second},
               {"memory_bytes", memory_bytes},
               {"flops_per_second", flops_per_second},
               {"bytes_at_90_percent", bytes_at_90_percent},
               {"memory_share_with_transfers", memory_share_with_transfers},
               {"sweep", Json::array()}};
  for (const TransferPoint& p : sweep) {
    json["sweep"].push_back({{"bytes", p.bytes},
                             {"threads", p.threads},
                             {"direct", p.direct},
                             {"with_compute", p.with_compute},
                             {"to_device", p.to_device},
                             {"pinned", p.pinned},
                             {"seconds", p.seconds},
                             {"spread", p.spread},
                             {"repeats", p.repeats},
                             {"bytes_per_second", p.bytes_per_second()}});
  }
  return json;
}

DeviceProfile DeviceProfile::FromJson(const Json& json, const std::string& what) {
  const auto number = [&](const char* key) {
    const bool there = json.is_object() && json.contains(key) && json[key].is_number();
    const double value = there ? json[key].get<double>() : -1;
    if (!(value >= 0 && value < 1e18)) {
      throw DataError(
          ErrorText(what + " is not a device profile",
                    std::string(key) + " is missing or out of range",
                    "make one: routecast-evaluate --mode=transfer --out=..."));
    }
    return value;
  };
  DeviceProfile profile;
  profile.link_bytes_per_second = number("link_bytes_per_second");
  profile.link_fixed_seconds = number("link_fixed_seconds");
  profile.memory_bytes_per_second = number("memory_bytes_per_second");
  if (profile.link_bytes_per_second < 1 || profile.memory_bytes_per_second < 1) {
    number("a rate above 0");
  }
  // Files of earlier versions lack these.
  if (json.contains("memory_bytes"))
    profile.memory_bytes = static_cast<uint64_t>(number("memory_bytes"));
  if (json.contains("flops_per_second"))
    profile.flops_per_second = number("flops_per_second");
  profile.name = json.value("name", what);
  profile.emulated = json.value("emulated", false);
  return profile;
}

DeviceProfile FindProfile(const std::string& name_or_file) {
  if (name_or_file == "rtx3090") {
    DeviceProfile profile;
    profile.name = "rtx3090";
    profile.emulated = true;
    profile.link_bytes_per_second = 25e9;
    profile.link_fixed_seconds = 10e-6;
    profile.memory_bytes_per_second = 936e9;
    profile.memory_bytes = uint64_t{24} << 30;
    profile.flops_per_second = 71e12;
    return profile;
  }
  fs::path file = name_or_file;
  if (fs::is_directory(file)) file /= "device_profile.json";
  if (!fs::exists(file)) {
    throw UsageError(ErrorText("no device profile: " + name_or_file,
                               "known by name: rtx3090",
                               "or a file of routecast-evaluate --mode=transfer"));
  }
  return DeviceProfile::FromJson(ReadJsonFile(file), file.string());
}

namespace {

const char* WayOf(const TransferPoint& p) {
  if (p.to_device) return p.pinned ? "to the device, pinned" : "to the device, pageable";
  return p.direct ? "direct" : "page cache";
}

}  // namespace

std::string ProfileTable(const DeviceProfile& profile) {
  Table table({"bytes", "threads", "<way", "<beside", "ms", "spread ms", "GB/s"});
  for (const TransferPoint& p : profile.sweep) {
    table.AddRow({FormatBytes(p.bytes), std::to_string(p.threads), WayOf(p),
                  p.with_compute ? "work that streams memory" : "nothing",
                  Fixed(1e3 * p.seconds, 3), Fixed(1e3 * p.spread, 3),
                  Fixed(p.bytes_per_second() / 1e9, 2)});
  }
  return table.ToText() + "link: " + Fixed(profile.link_bytes_per_second / 1e9, 2) +
         " GB/s, " + Fixed(1e6 * profile.link_fixed_seconds, 0) +
         " us a transfer, 90 % of the peak from " +
         FormatBytes(profile.bytes_at_90_percent) +
         " on\nmemory: " + Fixed(profile.memory_bytes_per_second / 1e9, 2) + " GB/s, " +
         Fixed(100 * profile.memory_share_with_transfers, 0) +
         " % of it beside transfers\n";
}

}  // namespace routecast
