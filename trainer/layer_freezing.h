// Fine-tuning from a finished run: its lower layers stay as they are at first and are
// released one after another, the top one first. A pure function of the epoch.
#pragma once

#include <cstdint>
#include <string>

#include "common/run_record.h"

namespace routecast {

struct LayerFreezing {
  int layers = 0;  // the lowest so many; 0 = none
  int epochs = 1;  // until the first is released, and between one and the next
  // First epoch in which a parameter of this name is trained. Layer i is `layer.i.*` or
  // `block.i.*`; embeddings belong to the lowest. 0 = always.
  int64_t ReleasedAt(const std::string& parameter) const;
  Json ToJson() const;
};

}  // namespace routecast
