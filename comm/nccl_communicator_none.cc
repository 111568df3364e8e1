#include "comm/nccl_communicator.h"
#include "common/errors.h"

namespace routecast {

namespace {

[[noreturn]] void Refuse() {
  throw EnvironmentError(ErrorText("this build has no CUDA, so no NCCL", "",
                                   "use --device=cpu, or build where nvcc is found"));
}

}  // namespace

std::string DeviceName(at::Device) { Refuse(); }

std::unique_ptr<Communicator> MakeNcclCommunicator(std::unique_ptr<Communicator>,
                                                   at::Device, double,
                                                   std::shared_ptr<CallWatch>) {
  Refuse();
}

}  // namespace routecast
