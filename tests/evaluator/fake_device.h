// A device made of host memory: a serial link of a given rate under a virtual clock,
// which moves on when the engine pauses. Bytes land when their copy is over, not before.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/errors.h"
#include "evaluator/device_copy.h"
#include "evaluator/expert_copies.h"

namespace routecast {

// What test and device share: the engine owns the device, the test looks on.
struct FakeDeviceLog {
  struct Copy {
    uint64_t device_offset, bytes;
    int stream;
  };
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<Copy> copies;
  size_t over = 0, most_under_way = 0;
  int fences = 0;
  std::vector<size_t> fences_before;  // copies enqueued before each fence
  std::vector<uint64_t> registered;   // sizes
  int unregistered = 0;
  uint64_t copied_back = 0;
  int copies_within = 0;
  double allocation_seconds = 0;
  std::vector<std::unique_ptr<std::byte[]>> slabs;
  uint64_t free_bytes = uint64_t{1} << 34, memory_bytes = uint64_t{1} << 34;
  int decoded = 0;
  // Managed memory: its pages on the device, by address, and the most there were.
  std::vector<std::pair<std::byte*, uint64_t>> managed;
  std::set<const std::byte*> resident;
  size_t resident_peak = 0;
  std::vector<std::unique_ptr<std::byte[]>> managed_slabs;
  bool held = false;     // Pause waits: time stands still
  bool hanging = false;  // no copy completes any more
  bool failing = false;  // the next copy is refused

  void WaitForCopies(size_t count) {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return copies.size() >= count; });
  }
  void Hold(bool hold) {
    std::lock_guard lock(mutex);
    held = hold;
    changed.notify_all();
  }
};

class FakeDevice : public DeviceCopy {
 public:
  FakeDevice(std::shared_ptr<FakeDeviceLog> log, double bytes_per_second,
             double fixed_seconds = 0)
      : log_(std::move(log)), rate_(bytes_per_second), fixed_(fixed_seconds) {}

  std::byte* Allocate(uint64_t bytes) override {
    std::lock_guard lock(log_->mutex);
    log_->slabs.push_back(std::make_unique<std::byte[]>(bytes));
    now_ += log_->allocation_seconds;
    return log_->slabs.back().get();
  }
  void Free(std::byte* slab) override {
    std::lock_guard lock(log_->mutex);
    if (std::erase_if(log_->slabs, [&](const auto& s) { return s.get() == slab; }) != 1)
      throw std::logic_error("FakeDevice: what is freed was not allocated");
  }
  uint64_t FreeBytes() const override {
    std::lock_guard lock(log_->mutex);
    return log_->free_bytes;
  }
  uint64_t MemoryBytes() const override {
    std::lock_guard lock(log_->mutex);
    return log_->memory_bytes;
  }
  void Register(std::byte* host, uint64_t bytes) override {
    std::lock_guard lock(log_->mutex);
    log_->registered.push_back(bytes);
    pinned_.push_back({host, bytes});
  }
  void Unregister(std::byte* host) override {
    std::lock_guard lock(log_->mutex);
    ++log_->unregistered;
    std::erase_if(pinned_, [&](const auto& p) { return p.first == host; });
  }
  void FenceAfterCompute() override {
    std::lock_guard lock(log_->mutex);
    ++log_->fences;
    log_->fences_before.push_back(log_->copies.size());
  }
  Ticket CopyAsync(std::byte* device, const std::byte* host, uint64_t bytes,
                   int stream) override {
    std::lock_guard lock(log_->mutex);
    if (log_->failing) {
      throw EnvironmentError(
          ErrorText("cudaMemcpyAsync failed on the CUDA device", "fake words", ""));
    }
    // Pageable memory goes at half the rate.
    const bool pinned = std::any_of(pinned_.begin(), pinned_.end(), [&](const auto& p) {
      return host >= p.first && host + bytes <= p.first + p.second;
    });
    free_at_ = std::max(free_at_, now_) + fixed_ +
               static_cast<double>(bytes) / (pinned ? rate_ : rate_ / 2);
    const std::byte* slab = log_->slabs.empty() ? nullptr : log_->slabs.front().get();
    log_->copies.push_back(
        {slab ? static_cast<uint64_t>(device - slab) : 0, bytes, stream});
    queue_.push_back({++last_, device, host, bytes, free_at_});
    log_->most_under_way = std::max(log_->most_under_way, queue_.size());
    log_->changed.notify_all();
    return last_;
  }
  // The link carries one way at a time.
  Ticket CopyBackAsync(std::byte* host, const std::byte* device, uint64_t bytes,
                       int) override {
    std::lock_guard lock(log_->mutex);
    log_->copied_back += bytes;
    free_at_ = std::max(free_at_, now_) + fixed_ + static_cast<double>(bytes) / rate_;
    queue_.push_back({++last_, host, device, bytes, free_at_});
    return last_;
  }
  // Ten times the link's rate, on a way of its own, one after another.
  Ticket CopyWithinAsync(std::byte* to, const std::byte* from, uint64_t bytes,
                         int) override {
    std::lock_guard lock(log_->mutex);
    ++log_->copies_within;
    within_free_at_ =
        std::max(within_free_at_, now_) + static_cast<double>(bytes) / (10 * rate_);
    within_.push_back({++last_, to, from, bytes, within_free_at_});
    return last_;
  }
  std::byte* AllocateManaged(uint64_t bytes) override {
    std::lock_guard lock(log_->mutex);
    log_->managed_slabs.push_back(std::make_unique<std::byte[]>(bytes + kPage));
    std::byte* slab = log_->managed_slabs.back().get();
    slab += kPage - reinterpret_cast<uintptr_t>(slab) % kPage;
    log_->managed.push_back({slab, bytes});
    return slab;
  }
  Ticket PrefetchAsync(const std::byte* managed, uint64_t bytes, int stream) override {
    CheckManaged(managed, bytes);
    const Ticket ticket =
        CopyAsync(const_cast<std::byte*>(managed), managed, bytes, stream);
    std::lock_guard lock(log_->mutex);
    for (uint64_t at = 0; at < bytes; at += kPage) log_->resident.insert(managed + at);
    log_->resident_peak = std::max(log_->resident_peak, log_->resident.size());
    return ticket;
  }
  void DropPrefetched(const std::byte* managed, uint64_t bytes) override {
    CheckManaged(managed, bytes);
    std::lock_guard lock(log_->mutex);
    for (uint64_t at = 0; at < bytes; at += kPage) log_->resident.erase(managed + at);
  }
  void Decode(const ExpertFileSpec& spec, const std::byte* blob,
              std::byte* expert) override {
    {
      std::lock_guard lock(log_->mutex);
      ++log_->decoded;
    }
    DecodeExpert(spec, blob, expert);
  }
  bool IsOver(Ticket ticket) override {
    std::lock_guard lock(log_->mutex);
    log_->over += Land(&queue_);
    Land(&within_);
    const auto has = [&](const std::deque<Pending>& way) {
      return std::any_of(way.begin(), way.end(),
                         [&](const Pending& p) { return p.ticket == ticket; });
    };
    return !has(queue_) && !has(within_);
  }
  double Now() const override {
    std::lock_guard lock(log_->mutex);
    return now_;
  }
  void Pause(double seconds) override {
    std::unique_lock lock(log_->mutex);
    log_->changed.wait(lock, [&] { return !log_->held; });
    if (log_->hanging) {
      now_ += 1;
    } else if (!queue_.empty() || !within_.empty()) {
      double next = 1e300;
      for (const auto* way : {&queue_, &within_}) {
        if (!way->empty()) next = std::min(next, way->front().over_at);
      }
      now_ = std::max(now_, next);
    } else {
      now_ += seconds;
    }
  }
  std::string description() const override { return "fake device"; }

 private:
  static constexpr uint64_t kPage = 4096;
  void CheckManaged(const std::byte* memory, uint64_t bytes) {
    std::lock_guard lock(log_->mutex);
    for (const auto& [slab, size] : log_->managed) {
      if (memory < slab || memory + bytes > slab + size) continue;
      if ((memory - slab) % kPage == 0 && bytes % kPage == 0) return;
    }
    throw std::logic_error("FakeDevice: no whole pages of managed memory");
  }
  struct Pending {
    Ticket ticket;
    std::byte* device;
    const std::byte* host;
    uint64_t bytes;
    double over_at;
  };
  // What is over arrives; how many.
  size_t Land(std::deque<Pending>* way) {
    size_t count = 0;
    for (; !log_->hanging && !way->empty() && way->front().over_at <= now_; ++count) {
      std::memmove(way->front().device, way->front().host, way->front().bytes);
      way->pop_front();
    }
    return count;
  }
  std::shared_ptr<FakeDeviceLog> log_;
  double rate_, fixed_;
  std::vector<std::pair<std::byte*, uint64_t>> pinned_;
  std::deque<Pending> queue_, within_;  // of the link, of the device's memory
  Ticket last_ = 0;
  double now_ = 0, free_at_ = 0, within_free_at_ = 0;
};

}  // namespace routecast
