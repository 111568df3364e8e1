// In a build without CUDA.
#include "common/errors.h"
#include "evaluator/device_copy.h"

namespace routecast {

std::unique_ptr<DeviceCopy> OpenCudaDevice(int) {
  throw EnvironmentError(ErrorText("this build has no CUDA",
                                   "nvcc was not found, or ROUTECAST_CUDA=OFF was set",
                                   "use --device=cpu, or build where nvcc is"));
}

}  // namespace routecast
