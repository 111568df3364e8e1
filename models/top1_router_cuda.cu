#include "models/launch_cuda.h"
#include "models/top1_body.h"
#include "models/warp_cuda.h"

namespace routecast {
namespace {

template <class Router, class Model>
__global__ void Top1Kernel(Top1Args args) {
  const int64_t row = WarpIndex();
  if (row < args.rows) Top1Row<Router, Model>(Warp(), args, row);
}

__global__ void DropKernel(DropArgs args) {
  const int64_t sequence = WarpIndex();
  if (sequence < args.sequences) DropRow(Warp(), args, sequence);
}

}  // namespace

void Top1Cuda(const Top1Args& args, int router, int model) {
  VisitFloatType(router, [&](auto r) {
    VisitFloatType(model, [&](auto m) {
      LaunchWarps(Top1Kernel<decltype(r), decltype(m)>, args.rows, args);
    });
  });
}

void DropCuda(const DropArgs& args) { LaunchWarps(DropKernel, args.sequences, args); }

}  // namespace routecast
