// What a device can do, as the simulator needs it: a link, memory that weights stream
// from, and the sweep that they were read from. Torch-free but for measuring compute.
#pragma once

#include <string>
#include <vector>

#include "common/files.h"
#include "common/run_record.h"
#include "evaluator/device_presets.h"

namespace routecast {

struct TransferPoint {
  uint64_t bytes = 0;
  int threads = 1;
  bool direct = true;
  bool with_compute = false;  // while every other core (device) streams memory
  bool both_ways = false;     // while as much goes the other way (a file is written)
  // A copy from host memory to a device; `threads` are then streams.
  bool to_device = false, pinned = false;
  double seconds = 0;  // median of one transfer
  double spread = 0;   // interquartile range
  int repeats = 0;
  double bytes_per_second() const { return static_cast<double>(bytes) / seconds; }
};

// Whole experts of a published shape (expert_transfers.h).
struct ExpertTransfer {
  std::string what;  // what is timed, in words
  int64_t d_model = 0, d_ff = 0;
  int experts = 0;
  uint64_t bytes = 0;              // of all of them
  double mean = 0, deviation = 0;  // seconds of a trial
  int trials = 0;
  double bytes_per_second() const {
    return mean > 0 ? static_cast<double>(bytes) / mean : 0;
  }
};

struct DeviceProfile {
  std::string name;
  bool emulated = false;  // from a data sheet, not measured here
  bool cpu = false;       // the link is a disk's; else a device's
  double link_bytes_per_second = 0, link_fixed_seconds = 0;
  double memory_bytes_per_second = 0;  // weights of a batch of one stream at this rate
  uint64_t memory_bytes = 0;    // of the device, or free on it when measured; 0 = unknown
  double flops_per_second = 0;  // of dense products; 0 = unknown
  uint64_t bytes_at_90_percent = 0;        // smallest transfer at 90 % of the peak
  double memory_share_with_transfers = 1;  // of the memory rate, while the link is busy
  std::vector<TransferPoint> sweep;
  std::vector<ExpertTransfer> experts;
  Json ToJson() const;
  // DataError naming `what` and the key.
  static DeviceProfile FromJson(const Json& json, const std::string& what);
};

// rtx3090 (24 GiB, 25 GB/s over PCIe 4 x16, 936 GB/s, 71 TFLOP/s bf16: data sheet), or a
// device_profile.json or a folder that holds one. UsageError naming what there is.
DeviceProfile FindProfile(const std::string& name_or_file);

DevicePreset PresetOf(const DeviceProfile& profile);

// (Measured in disk_sweep.h and device_sweep.h.)
std::string ProfileTable(const DeviceProfile& profile);

// seconds = fixed + bytes / rate, the line of least squared relative errors through the
// points. Exposed for tests. REQUIRES two sizes.
void FitLink(const std::vector<TransferPoint>& points, double* fixed_seconds,
             double* bytes_per_second);

}  // namespace routecast
