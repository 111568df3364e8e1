#include "models/launch_cuda.h"
#include "models/token_groups_body.h"
#include "models/warp_cuda.h"

namespace routecast {
namespace {

__global__ void CountKernel(SortArgs args) {
  if (WarpIndex() < args.tiles()) CountTile(Warp(), args, WarpIndex());
}
__global__ void ScanKernel(SortArgs args) {
  if (WarpIndex() == 0) ScanTiles(Warp(), args);
}
__global__ void PlaceKernel(SortArgs args) {
  if (WarpIndex() < args.tiles()) PlaceTile(Warp(), args, WarpIndex());
}

template <class Word>
__global__ void GatherKernel(GatherArgs args) {
  if (WarpIndex() < args.rows) GatherRow<Word>(Warp(), args, WarpIndex());
}

template <class T>
__global__ void ScatterKernel(ScatterArgs args) {
  if (WarpIndex() < args.rows) ScatterRow<T>(Warp(), args, WarpIndex());
}

}  // namespace

void SortCuda(const SortArgs& args) {
  LaunchWarps(CountKernel, args.tiles(), args);
  LaunchWarps(ScanKernel, 1, args);
  LaunchWarps(PlaceKernel, args.tiles(), args);
}

void GatherCuda(const GatherArgs& args, int word_bytes) {
  if (word_bytes == 16) return LaunchWarps(GatherKernel<uint4>, args.rows, args);
  if (word_bytes == 4) return LaunchWarps(GatherKernel<uint32_t>, args.rows, args);
  LaunchWarps(GatherKernel<uint16_t>, args.rows, args);
}

void ScatterCuda(const ScatterArgs& args, int type) {
  if (type == 0) return LaunchWarps(ScatterKernel<float>, args.rows, args);
  if (type == 1) return LaunchWarps(ScatterKernel<c10::BFloat16>, args.rows, args);
  LaunchWarps(ScatterKernel<c10::Half>, args.rows, args);
}

}  // namespace routecast
