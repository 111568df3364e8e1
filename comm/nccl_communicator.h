// Collectives over NCCL, bootstrapped over another communicator.
#pragma once

#include <memory>

#include "comm/communicator.h"

namespace routecast {

// `bootstrap` carries the unique id, host values and barriers. In a build without CUDA,
// and where NCCL cannot start, throws EnvironmentError.
std::unique_ptr<Communicator> MakeNcclCommunicator(
    std::unique_ptr<Communicator> bootstrap, at::Device device, double deadline_seconds);

}  // namespace routecast
