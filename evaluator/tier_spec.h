// --tier: the chain of memories that experts move through, fastest first. Torch-free.
// Thread rule: pure functions.
//   chain = ( "gpu" [":" SIZE] | [ "gpu" [":" SIZE] "," ] "host" [":" SIZE] |
//   "managed" [":" SIZE] ) "," "disk"
// "gpu:6GiB,host:16GiB,disk", "managed:6GiB,disk", "host:2GiB,disk", "host,disk". The
// first tier holds the slots that the model reads; without a SIZE, --expert_budget says
// it. A host tier behind a gpu tier is the pinned arena; without a SIZE it holds every
// expert, and without the tier ("gpu:6GiB,disk") a few are in it on their way. A managed
// tier is CUDA's managed memory: every expert has its place in it, in host memory, and
// SIZE bytes of them are on the device as well. A SIZE may be a share of its memory:
// "gpu:30%,host:50%,disk".
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace routecast {

struct TierChain {
  bool gpu = false;  // the model reads a device's memory: gpu or managed
  std::optional<uint64_t> gpu_bytes, host_bytes;
  bool managed = false;
  bool passes_host = false;  // gpu, disk: host memory holds nothing for later
  // Of all the memory there is; bytes once WithSizes has seen it.
  std::optional<double> gpu_share{}, host_share{};
  const char* fastest() const { return managed ? "managed" : gpu ? "gpu" : "host"; }
  // Of the first tier.
  std::optional<uint64_t> budget_bytes() const { return gpu ? gpu_bytes : host_bytes; }
  bool operator==(const TierChain&) const = default;
};

// UsageError: an unknown tier (the nearest is named), an order that is none, a size that
// is none. Empty text: host, disk.
TierChain ParseTiers(const std::string& text);

// Shares become bytes of the device's memory and of the machine's.
TierChain WithSizes(TierChain chain, uint64_t device_bytes, uint64_t host_bytes);

// The bytes of the fastest tier: --tier's where it gives them, else `budget_bytes`, what
// --expert_budget comes to. `budget_given`: the flag was set; then both must agree.
// UsageError naming both. REQUIRES no share.
uint64_t TierBudget(const TierChain& chain, uint64_t budget_bytes, bool budget_given);

}  // namespace routecast
