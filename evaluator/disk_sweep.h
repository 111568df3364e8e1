// --mode=transfer on a disk: how fast a file comes into memory. Torch-free. Thread rule:
// one thread; it makes others of its own.
#pragma once

#include "evaluator/device_profile.h"

namespace routecast {

struct DiskSweepOptions {
  fs::path folder;  // a scratch file of file_bytes is written there, and removed
  uint64_t file_bytes = uint64_t{1} << 29;
  uint64_t smallest = 64 << 10, largest = 256 << 20;
  double seconds_a_point = 0.3;
  bool quiet = false;
};
// Reads a scratch file at 64 KiB to 256 MiB (a factor of four apart) with 1, 2 and 4
// threads, direct and through the page cache, alone, beside a core that streams memory,
// and beside a thread that writes a file of its own. EnvironmentError where the folder
// cannot hold the file.
DeviceProfile MeasureDisk(const DiskSweepOptions& options);
// Link and where 90 % of its peak is reached, from profile->sweep: alone, with the number
// of threads that is fastest, by direct reads where there are any (what the page cache
// gives is memory, not a disk). Exposed for tests. REQUIRES two sizes of each.
void ConcludeDisk(DeviceProfile* profile);

}  // namespace routecast
