#include "evaluator/machine_sweep.h"

#include <algorithm>
#include <memory>

#include "evaluator/device_copy.h"
#include "evaluator/device_sweep.h"
#include "evaluator/expert_transfers.h"
#include "evaluator/kernel_sweep.h"

namespace routecast {

DeviceProfile MeasureMachine(const at::Device& device, const DiskSweepOptions& disk) {
  DeviceProfile profile = MeasureDisk(disk);
  ExpertTransferOptions experts;
  experts.quiet = disk.quiet;
  experts.weight_bytes = device.is_cuda() ? 2 : 4;
  experts.most_bytes = profile.memory_bytes / 4;
  if (device.is_cuda()) {
    DeviceSweepOptions sweep;
    sweep.quiet = disk.quiet;
    const std::unique_ptr<DeviceCopy> card = OpenCudaDevice(device.index());
    MeasureDevice(card.get(), sweep, &profile);
    experts.most_bytes = std::min(experts.most_bytes, card->FreeBytes() / 4);
    profile.experts = MeasureExpertTransfers(card.get(), experts);
  } else {
    profile.experts = MeasureExpertTransfers(nullptr, experts);
  }
  // What the runtime computes in: fp32 on a CPU, bf16 on a card.
  constexpr double kSeconds = 0.5;
  profile.flops_per_second = device.is_cuda()
                                 ? MeasureProducts(device, at::kBFloat16, 4096, kSeconds)
                                 : MeasureProducts(device, at::kFloat, 768, kSeconds);
  return profile;
}

}  // namespace routecast
