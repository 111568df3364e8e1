// Starting kernels of a warp a row on the current stream. For .cu files.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include "models/warp_cuda.h"

namespace routecast {

constexpr int kWarpsOfBlock = 4;

// The host does not wait. REQUIRES the device of the arguments to be the current one.
template <class Args>
void LaunchWarps(void (*kernel)(Args), int64_t warps, const Args& args) {
  if (warps == 0) return;
  const int64_t blocks = (warps + kWarpsOfBlock - 1) / kWarpsOfBlock;
  kernel<<<static_cast<unsigned>(blocks), kWarpsOfBlock * kWarpLanes, 0,
           c10::cuda::getCurrentCUDAStream().stream()>>>(args);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace routecast
