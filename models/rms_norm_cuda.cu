#include "models/launch_cuda.h"
#include "models/rms_norm_body.h"
#include "models/warp_cuda.h"

namespace routecast {
namespace {

template <class T>
__global__ void NormKernel(NormArgs args) {
  if (WarpIndex() < args.rows) NormOneRow<T>(Warp(), args, WarpIndex());
}

}  // namespace

void NormRowsCuda(const NormArgs& args, int type) {
  if (type == 0) return LaunchWarps(NormKernel<float>, args.rows, args);
  if (type == 1) return LaunchWarps(NormKernel<c10::BFloat16>, args.rows, args);
  LaunchWarps(NormKernel<c10::Half>, args.rows, args);
}

}  // namespace routecast
