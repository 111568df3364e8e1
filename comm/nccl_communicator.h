// Collectives over NCCL, bootstrapped over another communicator.
#pragma once

#include <memory>

#include "comm/call_watch.h"
#include "comm/communicator.h"

namespace routecast {

// `bootstrap` carries the unique id, host values and barriers. In a build without CUDA,
// and where NCCL cannot start, throws EnvironmentError. `watch` is the bootstrap's: one
// row of numbers for both.
std::unique_ptr<Communicator> MakeNcclCommunicator(
    std::unique_ptr<Communicator> bootstrap, at::Device device, double deadline_seconds,
    std::shared_ptr<CallWatch> watch);

}  // namespace routecast
