// Everything that --mode=transfer measures of a machine: its disk, whole experts, the
// link and memory of a CUDA device, how fast it multiplies. Thread rule: one thread.
#pragma once

#include <ATen/ATen.h>

#include "evaluator/device_profile.h"
#include "evaluator/disk_sweep.h"

namespace routecast {

// Throws as MeasureDisk and MeasureDevice.
DeviceProfile MeasureMachine(const at::Device& device, const DiskSweepOptions& disk);

}  // namespace routecast
