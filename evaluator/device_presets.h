// What the published system sets for which device: how much its memory manager fetches
// ahead, and the compression and batch that it suggests. Plain values.
#pragma once

#include <cstdint>
#include <string>

#include "common/run_record.h"

namespace routecast {

struct DevicePreset {
  std::string device;
  int most_experts = 2;
  double aggressiveness = 0.8;
  std::string compression = "int8";  // none, int8, int4: a suggestion, nothing is lossy
  int batch = 2;                     // a suggestion
  Json ToJson() const;
};

// Of a device by its name (RTX 3090, A100, Jetson), else by its memory; 0 bytes: a CPU.
DevicePreset PublishedPreset(const std::string& name, uint64_t memory_bytes);

}  // namespace routecast
