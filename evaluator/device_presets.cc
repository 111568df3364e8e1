#include "evaluator/device_presets.h"

#include <algorithm>
#include <cctype>

namespace routecast {
namespace {

bool Names(const std::string& name, const std::string& word) {
  const auto same = [](char a, char b) {
    return std::tolower(static_cast<unsigned char>(a)) == b;
  };
  return std::search(name.begin(), name.end(), word.begin(), word.end(), same) !=
         name.end();
}

}  // namespace

Json DevicePreset::ToJson() const {
  return {{"device", device},
          {"most_experts", most_experts},
          {"aggressiveness", aggressiveness},
          {"compression", compression},
          {"batch", batch}};
}

DevicePreset PublishedPreset(const std::string& name, uint64_t memory_bytes) {
  constexpr uint64_t kGigabyte = 1'000'000'000;
  if (memory_bytes == 0) return {"CPU", 2, 0.8, "int8", 2};
  if (Names(name, "3090")) return {"RTX 3090", 6, 0.7, "int8", 8};
  if (Names(name, "jetson") || Names(name, "orin") || Names(name, "xavier"))
    return {"Jetson", 4, 0.9, "int4", 4};
  if (Names(name, "a100")) return {"A100", 16, 0.5, "none", 32};
  if (memory_bytes > 20 * kGigabyte) return {"more than 20 GB", 8, 0.6, "int8", 16};
  if (memory_bytes > 10 * kGigabyte) return {"more than 10 GB", 4, 0.6, "int8", 8};
  return {"10 GB or less", 2, 0.6, "int4", 4};
}

}  // namespace routecast
