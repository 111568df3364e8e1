// What a forward pass leaves to the host while it goes on: sets of tensors travel into a
// ring of pinned memory and are used there in the order they were handed over. A full
// ring waits for its oldest set; nothing is ever dropped.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "models/host_copy.h"

namespace routecast {

// Thread rule: the forward thread. The destructor drops what was not used.
class CopyRing {
 public:
  // The tensors of a set, contiguous, on the CPU; valid during the call.
  using Use = std::function<void(const std::vector<at::Tensor>& on_host)>;
  static constexpr int64_t kBytes = int64_t{64} << 20;

  // Pinned memory: none before the first copy, then `bytes`, or as much as the largest
  // set where that is more. Borrows `copier`.
  explicit CopyRing(int64_t bytes = kBytes, HostCopier* copier = DeviceCopier());
  // Waits for what is under way, which nobody uses any more: a batch was given up.
  ~CopyRing();
  CopyRing(const CopyRing&) = delete;
  CopyRing& operator=(const CopyRing&) = delete;

  // Whether a set with `tensor` is copied; else Add uses it before it returns.
  bool Copies(const at::Tensor& tensor) const { return copier_->Copies(tensor); }
  // How many bytes a set of many like parts should have, so that several are under way.
  int64_t set_bytes() const { return bytes_ / 4; }
  // `tensors`, at least one, all of one device. Uses what has arrived; where the ring is
  // full, waits. EnvironmentError of a copy that failed: its set stays the oldest, so
  // each later call throws too.
  void Add(std::vector<at::Tensor> tensors, Use use);
  // Work queued on the current stream from now on waits for what is under way: the
  // sources may be written over by it.
  void HoldStream();
  // Waits for all that is under way and uses it.
  void Finish();

 private:
  struct Set {
    int64_t begin, end;  // its place in the ring
    std::vector<at::Tensor> on_host;
    std::unique_ptr<CopyFlight> flight;
    Use use;
  };
  int64_t Reserve(int64_t size);
  // -1: nowhere, before the oldest set is used.
  int64_t PlaceFor(int64_t size) const;
  void UseOldest();

  int64_t bytes_;
  HostCopier* copier_;
  at::Tensor ring_;
  std::deque<Set> under_way_;
};

}  // namespace routecast
