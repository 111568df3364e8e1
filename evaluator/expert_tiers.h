// The chain of memories of --tier, opened: engines that fill slots where the model reads
// them. Torch-free. Thread rule: one thread.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "evaluator/device_copy.h"
#include "evaluator/expert_file.h"
#include "evaluator/link_engine.h"
#include "evaluator/tier_spec.h"

namespace routecast {

struct ExpertTierOptions {
  TierChain chain;
  int io_threads = 3;
  bool direct = true;  // reads pass by the page cache, where the file system lets them
  // The device of a gpu tier; called once a link. OpenCudaDevice, or a test's.
  std::function<std::unique_ptr<DeviceCopy>()> open_device;
};

// What a link leads through.
struct ExpertTiers {
  std::unique_ptr<LinkEngine> engine;
  bool direct = true;         // reads do pass by the page cache
  int host_slots = 0;         // of the tier in the middle; 0 without one
  std::string device;         // of the slots, in words; "cpu" for host memory
  uint64_t device_bytes = 0;  // free on it when it was opened; 0: host memory
};

// disk -> `slots` slots of host memory, or -> host -> `slots` slots of the device, or ->
// managed memory, of which `slots` experts are on the device.
// EnvironmentError: memory that is not to be had, naming the --tier that would do.
ExpertTiers OpenTiers(std::shared_ptr<const ExpertFile> file, int slots,
                      const ExpertTierOptions& options);
// The same for slots that are filled once: what lies in the middle is only passed
// through, and slots of the device take the place of managed memory.
ExpertTiers OpenResidentTiers(std::shared_ptr<const ExpertFile> file,
                              const ExpertTierOptions& options);
// The same for compressed experts, never in managed memory: `slots` slots of decoded ones
// behind a few staging slots. `link`, owned by `engine`, is what is paced and carries the
// compressed bytes.
constexpr int kStagingSlots = 4;  // of compressed experts; they are in the budget
struct DecodingTiers {
  std::unique_ptr<TransferEngine> engine;
  LinkEngine* link = nullptr;
};
// What compressed experts take on their way into slots for experts of `spec`, which the
// budget has to hold as well; 0 where `kind` is lossless.
uint64_t StagingBytes(CopyKind kind, ExpertFileSpec spec);
DecodingTiers OpenDecodingTiers(std::shared_ptr<const ExpertFile> copies, int slots,
                                const ExpertTierOptions& options);

// Slots of the tier between disk and device: what its SIZE holds, else every expert; a
// few where it is only passed through; 0 without a device. UsageError where it holds
// fewer than two, naming the least that works.
int HostSlots(const TierChain& chain, const ExpertFile& file);

// Bytes of the fastest tier that are free now.
uint64_t FreeFastBytes(const ExpertTierOptions& options);

}  // namespace routecast
