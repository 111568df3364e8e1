// Work of fixed shapes that is done again and again, in one part or in several with the
// host's own work between them. On a GPU each part is recorded once and replayed as one
// CUDA graph, so that its kernels cost the host one call; on a CPU, and where recording
// fails, it runs as it is.
#pragma once

#include <c10/core/Device.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

namespace routecast {

// Thread rule: one thread at a time.
class StepGraph {
 public:
  static constexpr int kWarmUps = 2;  // whole steps before the one that records

  explicit StepGraph(c10::Device device, size_t num_parts = 1);
  // Gives back the device's memory of the recordings, but for what tensors that they made
  // still hold.
  ~StepGraph();
  // Runs `step`, behind what is queued on the current stream; what is queued there later
  // runs behind it. REQUIRES of `step`, where the device is a GPU: the same work on the
  // same memory in every call, no wait of the host, no gradients; tensors that it makes
  // may be read until the part's next call; a call may end before its work is done, and
  // come again (a recording that fails): it replaces what it reads at its end. Parts
  // follow one another, 0 behind the last; a step may end early, and the next one begins
  // with 0.
  void Run(const std::function<void()>& step, size_t part = 0);
  bool recorded() const;  // every part
  // Why a part runs as it is, though on a GPU; empty where none does.
  const char* failure() const;
  // Memory of the device that the allocator gave the recordings, whose parts share it.
  // What the driver itself keeps of a graph is not in it.
  uint64_t kept_bytes() const;

 private:
  struct Recording;
  std::unique_ptr<Recording> recording_;  // null on a CPU
};

}  // namespace routecast
