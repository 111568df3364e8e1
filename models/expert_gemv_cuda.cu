#include "models/expert_gemv_body.h"
#include "models/launch_cuda.h"
#include "models/warp_cuda.h"

namespace routecast {
namespace {

template <class T>
__global__ void GemvKernel(GemvArgs args) {
  if (WarpIndex() < args.tokens * args.columns) {
    GemvNumber<T>(Warp(), args, WarpIndex());
  }
}

}  // namespace

void GemvCuda(const GemvArgs& args, int type) {
  const int64_t numbers = args.tokens * args.columns;
  if (type == 0) return LaunchWarps(GemvKernel<float>, numbers, args);
  if (type == 1) return LaunchWarps(GemvKernel<c10::BFloat16>, numbers, args);
  LaunchWarps(GemvKernel<c10::Half>, numbers, args);
}

}  // namespace routecast
