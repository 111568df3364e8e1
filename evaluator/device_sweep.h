// --mode=transfer on a device: its link as it is, through the seam that the runtime's
// engine uses. Thread rule: one thread.
#pragma once

#include "evaluator/device_copy.h"
#include "evaluator/device_profile.h"

namespace routecast {

struct DeviceSweepOptions {
  uint64_t smallest = 64 << 10, largest = 256 << 20;  // a factor of four apart
  double seconds_a_point = 0.2;
  double deadline_seconds = 30;  // a copy that takes longer never completes
  bool quiet = false;
};

// Copies from host memory, pinned and pageable, on one and on two streams (of one
// transfer each half), alone and, for the largest, beside copies within the device and
// beside a copy of the same size back to the host.
// Adds these points to `profile`, and makes link, memory and name those of the device;
// what else is in it (a disk's points) stays. EnvironmentError: no room on the device or
// in host memory, or a copy that does not complete.
void MeasureDevice(DeviceCopy* device, const DeviceSweepOptions& options,
                   DeviceProfile* profile);

}  // namespace routecast
