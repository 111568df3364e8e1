#include <ATen/cuda/CUDAContext.h>

#include "models/device_choice.h"

namespace routecast {

int CudaComputeMajor(int index) {
  return at::cuda::getDeviceProperties(static_cast<c10::DeviceIndex>(index))->major;
}

}  // namespace routecast
