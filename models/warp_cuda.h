// The group of lanes (lane_group.h) of a GPU: a warp. For .cu files.
#pragma once

#include "models/lane_group.h"

namespace routecast {

constexpr int kWarpLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

struct Warp {
  __device__ int lane() const { return static_cast<int>(threadIdx.x) % kWarpLanes; }
  __device__ int size() const { return kWarpLanes; }
  __device__ void Sync() const { __syncwarp(); }
  __device__ float Max(float v) const {
    for (int d = kWarpLanes / 2; d > 0; d /= 2) {
      v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, d));
    }
    return v;
  }
  __device__ float Sum(float v) const {
    for (int d = kWarpLanes / 2; d > 0; d /= 2) v += __shfl_xor_sync(kAllLanes, v, d);
    return v;
  }
  __device__ Placed Best(Placed v) const {
    for (int d = kWarpLanes / 2; d > 0; d /= 2) {
      v = Better(v, {__shfl_xor_sync(kAllLanes, v.value, d),
                     static_cast<int64_t>(__shfl_xor_sync(
                         kAllLanes, static_cast<long long>(v.place), d))});
    }
    return v;
  }
  __device__ TopTwo Top(TopTwo v) const {
    for (int d = kWarpLanes / 2; d > 0; d /= 2) {
      v = Merged(v, {__shfl_xor_sync(kAllLanes, v.first, d),
                     __shfl_xor_sync(kAllLanes, v.second, d)});
    }
    return v;
  }
  __device__ int64_t SumBelow(int64_t v, int64_t* sum) const {
    long long upto = v;
    for (int d = 1; d < kWarpLanes; d *= 2) {
      const long long below = __shfl_up_sync(kAllLanes, upto, d);
      if (lane() >= d) upto += below;
    }
    *sum = __shfl_sync(kAllLanes, upto, kWarpLanes - 1);
    return upto - v;
  }
  __device__ int Claim(int* counts, int64_t key) const {
    const unsigned same = __match_any_sync(kAllLanes, static_cast<long long>(key));
    const int before = __popc(same & ((1u << lane()) - 1));
    const int first = key < 0 ? 0 : counts[key];
    __syncwarp();
    if (key >= 0 && before == 0) counts[key] = first + __popc(same);
    __syncwarp();
    return first + before;
  }
};

// Which warp of the grid this thread is in.
__device__ inline int64_t WarpIndex() {
  return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarpLanes;
}

}  // namespace routecast
