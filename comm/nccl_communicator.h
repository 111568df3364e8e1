// Collectives over NCCL, bootstrapped over another communicator.
#pragma once

#include <memory>
#include <span>
#include <string>

#include "comm/call_watch.h"
#include "comm/communicator.h"

namespace routecast {

// What tells a CUDA device from every other: host and the device's own number, whatever
// index it has there (a scheduler may show each rank one device, as number 0).
// EnvironmentError in a build without CUDA.
std::string DeviceName(at::Device device);

// `devices` by rank, as DeviceName has them. Throws UsageError where two of `group_size`
// neighbours (0: of all) have the same one, which NCCL refuses.
void RequireOwnDevices(std::span<const std::string> devices, int group_size = 0);

// `bootstrap` carries the unique id, host values and barriers. In a build without CUDA,
// and where NCCL cannot start, throws EnvironmentError; RequireOwnDevices' as well.
// `watch` is the bootstrap's: one row of numbers for both.
std::unique_ptr<Communicator> MakeNcclCommunicator(
    std::unique_ptr<Communicator> bootstrap, at::Device device, double deadline_seconds,
    std::shared_ptr<CallWatch> watch);

}  // namespace routecast
