// The published branches of `multiscale`: what its computation and its ONNX form share.
#pragma once

namespace routecast {

// At width 384: newest layers seen, heads, layers of the encoder.
struct BranchShape {
  int context, heads, layers;
};
inline constexpr int kBranches = 3, kFusionHeads = 8;
inline constexpr BranchShape kBranchShapes[kBranches] = {
    {2, 8, 3}, {3, 12, 4}, {4, 16, 5}};

// A number of heads that divides the width.
inline int HeadsFor(int width, int wanted) {
  while (width % wanted != 0) --wanted;
  return wanted;
}

}  // namespace routecast
