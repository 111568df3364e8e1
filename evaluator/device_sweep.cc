#include "evaluator/device_sweep.h"

#include <algorithm>
#include <vector>

#include "common/errors.h"
#include "common/progress.h"
#include "common/stop.h"
#include "evaluator/slot_arena.h"

namespace routecast {
namespace {

constexpr int kFewestRepeats = 5, kMostRepeats = 200;
constexpr double kPollSeconds = 2e-6;

class Sweep {
 public:
  Sweep(DeviceCopy* device, const DeviceSweepOptions& options)
      : device_(device),
        options_(options),
        host_(2, options.largest),  // what goes there; what comes back
        slab_(device->Allocate(2 * options.largest)) {}
  ~Sweep() {
    if (lost_) return;  // to free anything would wait for it
    try {
      device_->Free(slab_);
    } catch (const std::exception&) {  // what was thrown before says more
    }
  }

  TransferPoint Measure(TransferPoint point) {
    std::vector<double> times;
    const double start = device_->Now();
    while (static_cast<int>(times.size()) < kFewestRepeats ||
           (device_->Now() - start < options_.seconds_a_point &&
            static_cast<int>(times.size()) < kMostRepeats)) {
      ThrowIfStopped("while copying to the device");
      times.push_back(Transfer(point));
    }
    std::sort(times.begin(), times.end());
    const auto at = [&](double q) {
      return times[static_cast<size_t>(q * static_cast<double>(times.size() - 1))];
    };
    point.seconds = at(0.5);
    point.spread = at(0.75) - at(0.25);
    point.repeats = static_cast<int>(times.size());
    return point;
  }

  // A copy within the device reads and writes every byte.
  double MemoryBytesPerSecond() {
    double best = 0;
    for (int i = 0; i < kFewestRepeats; ++i) {
      const double start = device_->Now();
      Finish({Within(0)});
      best = std::max(
          best, 2 * static_cast<double>(options_.largest) / (device_->Now() - start));
    }
    return best;
  }

  std::byte* host() const { return host_.base(); }
  uint64_t host_bytes() const { return host_.size_bytes(); }

 private:
  DeviceCopy::Ticket Within(int stream) {
    return device_->CopyWithinAsync(slab_ + options_.largest, slab_, options_.largest,
                                    stream);
  }

  double Transfer(const TransferPoint& point) {
    std::vector<DeviceCopy::Ticket> others, tickets;
    // One behind the other: the memory is busy until the transfer is over.
    if (point.with_compute) others = {Within(1), Within(1)};
    if (point.both_ways) {
      others.push_back(device_->CopyBackAsync(host_.slot(1), slab_ + options_.largest,
                                              point.bytes, 1));
    }
    const double start = device_->Now();
    const uint64_t part = point.bytes / static_cast<uint64_t>(point.threads);
    for (int stream = 0; stream < point.threads; ++stream) {
      const uint64_t from = static_cast<uint64_t>(stream) * part;
      tickets.push_back(
          device_->CopyAsync(slab_ + from, host_.base() + from, part, stream));
    }
    Finish(tickets, point.with_compute ? &others : nullptr);
    const double seconds = device_->Now() - start;
    Finish(others);
    return seconds;
  }

  // Of `within`, copies within the device, two are under way meanwhile.
  void Finish(const std::vector<DeviceCopy::Ticket>& tickets,
              std::vector<DeviceCopy::Ticket>* within = nullptr) {
    const double start = device_->Now();
    for (const DeviceCopy::Ticket ticket : tickets) {
      while (!device_->IsOver(ticket)) {
        if (within && device_->IsOver(within->front())) {
          within->erase(within->begin());
          within->push_back(Within(1));
        }
        if (device_->Now() - start > options_.deadline_seconds) {
          lost_ = true;
          throw EnvironmentError(ErrorText("a copy to the device does not complete",
                                           device_->description(),
                                           "nvidia-smi says what it is doing"));
        }
        device_->Pause(kPollSeconds);
      }
    }
  }

  DeviceCopy* device_;
  DeviceSweepOptions options_;
  SlotArena host_;
  std::byte* slab_;
  bool lost_ = false;
};

// The pinned points of one stream: what the runtime's engine uses.
std::vector<TransferPoint> EngineLine(const std::vector<TransferPoint>& points) {
  std::vector<TransferPoint> line;
  for (const TransferPoint& p : points) {
    if (p.pinned && p.threads == 1 && !p.with_compute && !p.both_ways) line.push_back(p);
  }
  return line;
}

}  // namespace

void MeasureDevice(DeviceCopy* device, const DeviceSweepOptions& options,
                   DeviceProfile* profile) {
  std::vector<uint64_t> sizes;
  for (uint64_t s = options.smallest; s <= options.largest; s *= 4) sizes.push_back(s);
  profile->cpu = false;
  profile->memory_bytes = device->FreeBytes();
  Sweep sweep(device, options);
  std::vector<TransferPoint> points;
  Progress progress("copies to the device", "points", 4 * sizes.size() + 2,
                    options.quiet);
  for (const bool pinned : {false, true}) {
    if (pinned) device->Register(sweep.host(), sweep.host_bytes());
    for (const int streams : {1, 2}) {
      for (const uint64_t bytes : sizes) {
        TransferPoint point;
        point.bytes = bytes;
        point.threads = streams;
        point.to_device = true;
        point.pinned = pinned;
        points.push_back(sweep.Measure(point));
        progress.Update(points.size());
      }
    }
  }
  TransferPoint beside = EngineLine(points).back();
  beside.with_compute = true;
  points.push_back(sweep.Measure(beside));
  beside.with_compute = false;
  beside.both_ways = true;
  points.push_back(sweep.Measure(beside));
  progress.Update(points.size());
  device->Unregister(sweep.host());
  progress.Finish();
  const std::vector<TransferPoint> line = EngineLine(points);
  double best = 0;
  for (const TransferPoint& p : line) best = std::max(best, p.bytes_per_second());
  FitLink(line, &profile->link_fixed_seconds, &profile->link_bytes_per_second);
  const auto full = std::find_if(line.begin(), line.end(), [&](const TransferPoint& p) {
    return p.bytes_per_second() >= 0.9 * best;
  });
  profile->bytes_at_90_percent = full->bytes;
  profile->memory_bytes_per_second = sweep.MemoryBytesPerSecond();
  profile->memory_share_with_transfers = 1;  // copies are far slower than the memory
  profile->name = device->description();
  profile->sweep.insert(profile->sweep.end(), points.begin(), points.end());
}

}  // namespace routecast
