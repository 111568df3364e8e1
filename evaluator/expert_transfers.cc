#include "evaluator/expert_transfers.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "common/errors.h"
#include "common/progress.h"
#include "common/stop.h"
#include "evaluator/clock.h"
#include "evaluator/host_pages.h"

namespace routecast {
namespace {

constexpr int kFewestTrials = 3;
constexpr double kPollSeconds = 2e-6;

uint64_t ExpertBytes(std::pair<int64_t, int64_t> shape,
                     const ExpertTransferOptions& options) {
  return 2 * static_cast<uint64_t>(shape.first) * static_cast<uint64_t>(shape.second) *
         options.weight_bytes;
}

// Mean and deviation of `trial`, which returns the seconds it took.
void Repeat(const ExpertTransferOptions& options, const std::function<double()>& now,
            const std::function<double()>& trial, ExpertTransfer* row) {
  const double begin = now();
  for (int i = 0; i < options.warm_ups && now() - begin < options.seconds_a_row; ++i)
    trial();
  std::vector<double> times;
  const double start = now();
  while (static_cast<int>(times.size()) < options.trials &&
         (static_cast<int>(times.size()) < kFewestTrials ||
          now() - start < options.seconds_a_row)) {
    ThrowIfStopped("while moving experts");
    times.push_back(trial());
  }
  const double n = static_cast<double>(times.size());
  double sum = 0, squares = 0;
  for (const double t : times) sum += t;
  row->mean = sum / n;
  for (const double t : times) squares += (t - row->mean) * (t - row->mean);
  row->deviation = std::sqrt(squares / n);
  row->trials = static_cast<int>(times.size());
}

// What is timed, by the name of its rows.
struct Kind {
  std::string what;
  std::function<double(uint64_t expert_bytes, int experts)> trial;
};

class DeviceSide {
 public:
  DeviceSide(DeviceCopy* device, uint64_t most, double deadline)
      : device_(device),
        deadline_(deadline),
        host_(most),
        slab_(device->Allocate(2 * most)) {}
  ~DeviceSide() {
    if (lost_) return;  // to free anything would wait for it
    try {
      Pin(false);
      device_->Free(slab_);
    } catch (const std::exception&) {  // what was thrown before says more
    }
  }

  std::vector<Kind> Kinds() {
    const auto alone = [this](const std::function<DeviceCopy::Ticket(
                                  uint64_t from, uint64_t bytes)>& copy) {
      return [this, copy](uint64_t bytes, int experts) {
        const double start = device_->Now();
        DeviceCopy::Ticket last = 0;
        for (int e = 0; e < experts; ++e)
          last = copy(static_cast<uint64_t>(e) * bytes, bytes);
        Finish(last);
        return device_->Now() - start;
      };
    };
    const auto to_device = alone([this](uint64_t from, uint64_t bytes) {
      return device_->CopyAsync(slab_ + from, host_.data() + from, bytes, 0);
    });
    return {{"to the device, pageable",
             [this, to_device](uint64_t bytes, int experts) {
               Pin(false);
               return to_device(bytes, experts);
             }},
            {"to the device, pinned",
             [this, to_device](uint64_t bytes, int experts) {
               Pin(true);
               return to_device(bytes, experts);
             }},
            {"within the device", alone([this](uint64_t from, uint64_t bytes) {
               return device_->CopyWithinAsync(slab_ + host_.bytes() + from, slab_ + from,
                                               bytes, 0);
             })},
            {"allocation, device",
             [this](uint64_t bytes, int experts) {
               const double start = device_->Now();
               std::byte* taken =
                   device_->Allocate(static_cast<uint64_t>(experts) * bytes);
               const double seconds = device_->Now() - start;
               device_->Free(taken);
               return seconds;
             }},
            {"allocation, pinned", [this](uint64_t bytes, int experts) {
               const double start = device_->Now();
               const HostPages pages(static_cast<uint64_t>(experts) * bytes);
               device_->Register(pages.data(), pages.bytes());
               const double seconds = device_->Now() - start;
               device_->Unregister(pages.data());
               return seconds;
             }}};
  }

 private:
  void Pin(bool pinned) {
    if (pinned == pinned_) return;
    pinned ? device_->Register(host_.data(), host_.bytes())
           : device_->Unregister(host_.data());
    pinned_ = pinned;
  }
  // Copies of a stream end in their order.
  void Finish(DeviceCopy::Ticket ticket) {
    for (const double start = device_->Now(); !device_->IsOver(ticket);
         device_->Pause(kPollSeconds)) {
      if (device_->Now() - start <= deadline_) continue;
      lost_ = true;
      throw EnvironmentError(ErrorText("a copy to the device does not complete",
                                       device_->description(),
                                       "nvidia-smi says what it is doing"));
    }
  }
  DeviceCopy* device_;
  double deadline_;
  HostPages host_;
  std::byte* slab_;
  bool pinned_ = false, lost_ = false;
};

Kind WithinHost(HostPages* from, HostPages* to, const Clock* clock) {
  return {"within host memory", [from, to, clock](uint64_t bytes, int experts) {
            const double start = clock->Now();
            for (int e = 0; e < experts; ++e) {
              const uint64_t at = static_cast<uint64_t>(e) * bytes;
              std::memcpy(to->data() + at, from->data() + at, bytes);
            }
            return clock->Now() - start;
          }};
}

Kind PageableAllocation(const std::function<double()>& now) {
  return {"allocation, pageable", [now](uint64_t bytes, int experts) {
            const double start = now();
            const HostPages pages(static_cast<uint64_t>(experts) * bytes);
            return now() - start;
          }};
}

}  // namespace

std::vector<ExpertTransfer> MeasureExpertTransfers(DeviceCopy* device,
                                                   const ExpertTransferOptions& options) {
  std::vector<ExpertTransfer> rows;
  uint64_t most = 0;
  for (const auto& shape : options.shapes) {
    for (const int experts : options.experts) {
      const uint64_t bytes = static_cast<uint64_t>(experts) * ExpertBytes(shape, options);
      if (bytes > options.most_bytes) continue;
      most = std::max(most, bytes);
      rows.push_back({"", shape.first, shape.second, experts, bytes});
    }
  }
  if (rows.empty()) return rows;
  const SteadyClock clock;
  const std::function<double()> now = [device, &clock] {
    return device ? device->Now() : clock.Now();
  };
  std::optional<DeviceSide> side;
  std::unique_ptr<HostPages> from, to;
  std::vector<Kind> kinds;
  if (device) {
    side.emplace(device, most, options.deadline_seconds);
    kinds = side->Kinds();
  } else {
    from = std::make_unique<HostPages>(most);
    to = std::make_unique<HostPages>(most);
    kinds = {WithinHost(from.get(), to.get(), &clock)};
  }
  kinds.push_back(PageableAllocation(now));
  Progress progress("experts moved", "rows", kinds.size() * rows.size(), options.quiet);
  std::vector<ExpertTransfer> measured;
  for (const Kind& kind : kinds) {
    for (ExpertTransfer row : rows) {
      row.what = kind.what;
      Repeat(
          options, now,
          [&] {
            return kind.trial(row.bytes / static_cast<uint64_t>(row.experts),
                              row.experts);
          },
          &row);
      measured.push_back(row);
      progress.Update(measured.size());
    }
  }
  progress.Finish();
  return measured;
}

}  // namespace routecast
