// --tier: the chain of memories that experts move through, fastest first. Torch-free.
// Thread rule: pure functions.
//   chain = [ "gpu" [":" SIZE] "," ] "host" [":" SIZE] "," "disk"
// "gpu:6GiB,host:16GiB,disk", "host:2GiB,disk", "host,disk". The first tier holds the
// slots that the model reads; without a SIZE, --expert_budget says it. A host tier behind
// a gpu tier is the pinned arena; without a SIZE it holds every expert.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace routecast {

struct TierChain {
  bool gpu = false;
  std::optional<uint64_t> gpu_bytes, host_bytes;
  const char* fastest() const { return gpu ? "gpu" : "host"; }
  // Of the first tier.
  std::optional<uint64_t> budget_bytes() const { return gpu ? gpu_bytes : host_bytes; }
  bool operator==(const TierChain&) const = default;
};

// UsageError: an unknown tier (the nearest is named), an order that is none, a size that
// is none. Empty text: host, disk.
TierChain ParseTiers(const std::string& text);

// The bytes of the fastest tier: --tier's where it gives them, else `budget_bytes`, what
// --expert_budget comes to. `budget_given`: the flag was set; then both must agree.
// UsageError naming both.
uint64_t TierBudget(const TierChain& chain, uint64_t budget_bytes, bool budget_given);

}  // namespace routecast
