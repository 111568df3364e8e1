#include "evaluator/tier_spec.h"

#include <algorithm>
#include <cstdlib>
#include <sstream>
#include <vector>

#include "common/errors.h"
#include "common/files.h"

namespace routecast {
namespace {

const std::vector<std::string> kTiers = {"gpu", "managed", "host", "disk"};
constexpr char kExample[] =
    "write --tier=gpu:6GiB,host:16GiB,disk, --tier=gpu:30%,host:50%,disk, "
    "--tier=managed:6GiB,disk or --tier=host:2GiB,disk";
enum Kind { kGpu, kManaged, kHost, kDisk };  // of kTiers

[[noreturn]] void Wrong(const std::string& text, const std::string& why) {
  throw UsageError(
      ErrorText("--tier=" + text + " is no chain of memories", why, kExample));
}

struct Tier {
  int kind = kGpu;
  std::optional<uint64_t> bytes;
  std::optional<double> share;
};

// "30%" -> .3; nullopt: no share.
std::optional<double> ParseShare(const std::string& text, const std::string& size) {
  if (size.empty() || size.back() != '%') return std::nullopt;
  char* end = nullptr;
  const double percent = std::strtod(size.c_str(), &end);
  if (end != size.c_str() + size.size() - 1 || !(percent > 0 && percent <= 100))
    Wrong(text, size + " is no share of a memory");
  return percent / 100;
}

Tier ParseTier(const std::string& text, const std::string& item) {
  const size_t colon = item.find(':');
  Tier tier;
  tier.kind = ParseChoice("--tier", item.substr(0, colon), kTiers);
  if (colon == std::string::npos) return tier;
  if (tier.kind == kDisk) Wrong(text, "the disk holds every expert and has no size");
  const std::string size = item.substr(colon + 1);
  tier.share = ParseShare(text, size);
  if (tier.share) return tier;
  tier.bytes = ParseBytes("--tier", size);
  if (*tier.bytes == 0)
    Wrong(text, kTiers[static_cast<size_t>(tier.kind)] + " of no bytes");
  return tier;
}

}  // namespace

TierChain ParseTiers(const std::string& text) {
  TierChain chain;
  if (text.empty()) return chain;
  std::vector<Tier> tiers;
  std::stringstream in(text + ",");
  for (std::string item; std::getline(in, item, ',');) {
    const Tier tier = ParseTier(text, item);
    if (!tiers.empty() && tier.kind <= tiers.back().kind)
      Wrong(text, "the order is gpu, host, disk, each once");
    if (tier.kind == kGpu || tier.kind == kManaged) {
      chain.gpu_bytes = tier.bytes;
      chain.gpu_share = tier.share;
    }
    if (tier.kind == kHost) {
      chain.host_bytes = tier.bytes;
      chain.host_share = tier.share;
    }
    tiers.push_back(tier);
  }
  if (tiers.back().kind != kDisk)
    Wrong(text, "experts come from disk: it ends with disk");
  chain.managed = std::any_of(tiers.begin(), tiers.end(),
                              [](const Tier& tier) { return tier.kind == kManaged; });
  chain.gpu = chain.managed || tiers.front().kind == kGpu;
  if (chain.managed) {
    if (tiers.size() == 2) return chain;
    Wrong(text, "managed memory is host and device memory in one: only disk follows it");
  }
  if (tiers.size() < 2) Wrong(text, "nothing lies before the disk");
  chain.passes_host = chain.gpu && tiers.size() == 2;
  return chain;
}

TierChain WithSizes(TierChain chain, uint64_t device_bytes, uint64_t host_bytes) {
  const auto of = [](uint64_t memory, double share) {
    return static_cast<uint64_t>(share * static_cast<double>(memory));
  };
  if (chain.gpu_share) chain.gpu_bytes = of(device_bytes, *chain.gpu_share);
  if (chain.host_share) chain.host_bytes = of(host_bytes, *chain.host_share);
  chain.gpu_share.reset();
  chain.host_share.reset();
  return chain;
}

uint64_t TierBudget(const TierChain& chain, uint64_t budget_bytes, bool budget_given) {
  const std::optional<uint64_t> sized = chain.budget_bytes();
  if (!sized) return budget_bytes;
  if (budget_given && *sized != budget_bytes) {
    throw UsageError(ErrorText("--tier and --expert_budget give different sizes",
                               std::string(chain.fastest()) + " " + FormatBytes(*sized) +
                                   ", --expert_budget " + FormatBytes(budget_bytes),
                               "leave one of them out"));
  }
  return *sized;
}

}  // namespace routecast
