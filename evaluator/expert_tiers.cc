#include "evaluator/expert_tiers.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <string>
#include <utility>

#include "common/errors.h"
#include "evaluator/decoding_engine.h"
#include "evaluator/device_transfer_engine.h"
#include "evaluator/disk_transfer_engine.h"
#include "evaluator/expert_copies.h"

namespace routecast {
namespace {

constexpr int kPassingSlots = 8;    // of a host tier that is only passed through
constexpr int kLeastHostSlots = 2;  // one is read while the other leaves

// What the system could give without swapping: the page cache counts, where it says so.
uint64_t FreeHostBytes() {
  std::ifstream info("/proc/meminfo");
  std::string key;
  for (uint64_t kibibytes = 0; info >> key >> kibibytes; info.ignore(64, '\n')) {
    if (key == "MemAvailable:") return kibibytes << 10;
  }
  return static_cast<uint64_t>(::sysconf(_SC_AVPHYS_PAGES)) *
         static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
}

// Slots of one slab of the device.
class DeviceSlab : public SlotMemory {
 public:
  DeviceSlab(DeviceCopy* device, int num_slots, uint64_t slot_bytes)
      : stride_((slot_bytes + 4095) / 4096 * 4096),
        base_(device->Allocate(stride_ * static_cast<uint64_t>(num_slots))) {}
  std::byte* slot(int slot) const override {
    return base_ + static_cast<uint64_t>(slot) * stride_;
  }

 private:
  uint64_t stride_;
  std::byte* base_;  // the device's
};

ExpertTiers Open(std::shared_ptr<const ExpertFile> file, int slots, int host_slots,
                 const ExpertTierOptions& options) {
  DiskEngineOptions disk_options;
  disk_options.num_threads = options.io_threads;
  disk_options.direct = options.direct;
  const ExpertFileSpec spec = file->spec();
  ExpertTiers tiers;
  const int first_hop = options.chain.gpu ? host_slots : slots;
  std::unique_ptr<DeviceCopy> device;
  if (options.chain.gpu) {
    device = options.open_device();
    tiers.device_bytes = device->FreeBytes();
  }
  if (options.chain.managed) {
    // Reads past the page cache want memory that the driver does not move.
    disk_options.direct = false;
    disk_options.memory =
        device->AllocateManaged(SlotArena::SlotBytes(host_slots, spec.stride_bytes()));
  }
  auto disk =
      std::make_unique<DiskTransferEngine>(std::move(file), first_hop, disk_options);
  tiers.direct = disk->direct();
  if (!options.chain.gpu) {
    tiers.device = "cpu";
    tiers.engine = std::move(disk);
    return tiers;
  }
  tiers.host_slots = host_slots;
  tiers.device = device->description();
  std::byte* base = disk->arena().base();
  const uint64_t bytes = disk->arena().size_bytes();
  DeviceEngineOptions device_options;
  device_options.managed = options.chain.managed;
  tiers.engine = std::make_unique<DeviceTransferEngine>(
      spec, std::move(device), std::move(disk), base, bytes, host_slots, slots,
      device_options);
  return tiers;
}

// Locking what is not there would end in the system's killing somebody.
void CheckHostRoom(int host_slots, const ExpertFileSpec& spec) {
  const uint64_t wanted = static_cast<uint64_t>(host_slots) * spec.stride_bytes();
  const uint64_t free = FreeHostBytes();
  if (wanted < free / 10 * 9) return;
  throw EnvironmentError(ErrorText(
      "no room in host memory for the experts behind the gpu tier",
      FormatBytes(wanted) + " wanted, " + FormatBytes(free) + " free",
      "give the host tier a size: --tier=gpu:SIZE,host:" + std::to_string(free / 2) +
          ",disk"));
}

}  // namespace

int HostSlots(const TierChain& chain, const ExpertFile& file) {
  if (!chain.gpu) return 0;
  if (chain.passes_host)
    return std::min(kPassingSlots, std::max(kLeastHostSlots, file.count()));
  if (!chain.host_bytes) return std::max(kLeastHostSlots, file.count());
  const uint64_t slot = file.spec().stride_bytes();
  const auto slots = static_cast<int>(
      std::min<uint64_t>(*chain.host_bytes / slot, static_cast<uint64_t>(file.count())));
  if (slots >= kLeastHostSlots) return slots;
  throw UsageError(
      ErrorText("the host tier holds fewer than two experts",
                FormatBytes(*chain.host_bytes) + ", an expert takes " + FormatBytes(slot),
                "give it host:" + std::to_string(kLeastHostSlots * slot) + " at least"));
}

uint64_t FreeFastBytes(const ExpertTierOptions& options) {
  return options.chain.gpu ? options.open_device()->FreeBytes() : FreeHostBytes();
}

ExpertTiers OpenTiers(std::shared_ptr<const ExpertFile> file, int slots,
                      const ExpertTierOptions& options) {
  const int host_slots = HostSlots(options.chain, *file);
  if (options.chain.gpu) CheckHostRoom(host_slots, file->spec());
  return Open(std::move(file), slots, host_slots, options);
}

ExpertTiers OpenResidentTiers(std::shared_ptr<const ExpertFile> file,
                              const ExpertTierOptions& options) {
  const int count = file->count();
  ExpertTierOptions copied = options;
  copied.chain.managed = false;
  return Open(std::move(file), count, std::min(count, kPassingSlots), copied);
}

uint64_t StagingBytes(CopyKind kind, ExpertFileSpec spec) {
  if (kind == CopyKind::kLossless) return 0;
  spec.copies = kind;
  return kStagingSlots * spec.stride_bytes();
}

DecodingTiers OpenDecodingTiers(std::shared_ptr<const ExpertFile> copies, int slots,
                                const ExpertTierOptions& options) {
  const ExpertFileSpec spec = copies->spec();
  ExpertTierOptions copied = options;
  copied.chain.managed = false;
  ExpertTiers inner = OpenTiers(std::move(copies), kStagingSlots, copied);
  DecodingTiers tiers;
  tiers.link = inner.engine.get();
  std::unique_ptr<SlotMemory> memory;
  DecodingEngine::Decode decode = [spec](const std::byte* blob, std::byte* to) {
    DecodeExpert(spec, blob, to);
  };
  if (options.chain.gpu) {
    std::shared_ptr<DeviceCopy> device = options.open_device();
    memory = std::make_unique<DeviceSlab>(device.get(), slots, spec.expert_bytes());
    decode = [spec, device](const std::byte* blob, std::byte* to) {
      device->Decode(spec, blob, to);
    };
  } else {
    memory = std::make_unique<SlotArena>(slots, spec.expert_bytes());
  }
  tiers.engine = std::make_unique<DecodingEngine>(
      std::move(inner.engine), kStagingSlots, std::move(memory), std::move(decode),
      std::string(CopyName(spec.copies)) + " copies");
  return tiers;
}

}  // namespace routecast
