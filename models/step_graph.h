// Work of fixed shapes that is done again and again. On a GPU it is recorded once and
// replayed as one CUDA graph, so that its kernels cost the host one call; on a CPU, and
// where recording fails, it runs as it is.
#pragma once

#include <c10/core/Device.h>

#include <functional>
#include <memory>

namespace routecast {

// Thread rule: one thread at a time.
class StepGraph {
 public:
  static constexpr int kWarmUps = 2;  // calls before the one that records

  explicit StepGraph(c10::Device device);
  ~StepGraph();
  // Runs `step`, behind what is queued on the current stream; what is queued there later
  // runs behind it. REQUIRES of `step`, where the device is a GPU: the same work on the
  // same memory in every call, no wait of the host, no gradients; tensors that it makes
  // may be read until the next call.
  void Run(const std::function<void()>& step);
  bool recorded() const;
  // Why it runs as it is, though on a GPU; empty where it does not.
  const char* failure() const;

 private:
  struct Recording;
  std::unique_ptr<Recording> recording_;  // null on a CPU
};

}  // namespace routecast
