// A transfer engine that is a link of its own: it can be paced, and measured alone.
#pragma once

#include <cstdint>
#include <span>

#include "evaluator/transfer_engine.h"

namespace routecast {

class LinkEngine : public TransferEngine {
 public:
  // Carries no more than this from now on, as a serial link of that rate would; 0 = as
  // much as it can. Any thread.
  virtual void SetPace(double bytes_per_second) = 0;
  // Bytes so far that a memory in the middle had to read from disk first; 0 where the
  // disk is the link itself. Any thread.
  virtual uint64_t disk_bytes() const { return 0; }
  // Of the device's memory, by whomever; 0 where the slots are host memory. Any thread.
  virtual uint64_t device_bytes_in_use() const { return 0; }
};

// What the link carries alone, in bytes a second: the experts of `keys` one after another
// and round again into `num_slots` slots, two under way, unpaced, for about `seconds` and
// at least `least` experts. REQUIRES nothing under way. Overwrites slots, and leaves no
// pace and a `done` that does nothing. EnvironmentError where one cannot be brought.
double MeasurePeak(LinkEngine* engine, std::span<const ExpertKey> keys, int num_slots,
                   double seconds, size_t least = 0);

}  // namespace routecast
