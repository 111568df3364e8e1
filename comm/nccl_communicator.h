// Collectives over NCCL, bootstrapped over another communicator.
#pragma once

#include <memory>
#include <span>
#include <string>

#include "comm/call_watch.h"
#include "comm/communicator.h"

namespace routecast {

// `devices`, by rank: host and the device's own number, whatever index it has there (a
// scheduler may show each rank one device, as number 0). Throws UsageError where two
// ranks have the same one, which NCCL refuses.
void RequireOwnDevices(std::span<const std::string> devices);

// `bootstrap` carries the unique id, host values and barriers. In a build without CUDA,
// and where NCCL cannot start, throws EnvironmentError; RequireOwnDevices' as well.
// `watch` is the bootstrap's: one row of numbers for both.
std::unique_ptr<Communicator> MakeNcclCommunicator(
    std::unique_ptr<Communicator> bootstrap, at::Device device, double deadline_seconds,
    std::shared_ptr<CallWatch> watch);

}  // namespace routecast
