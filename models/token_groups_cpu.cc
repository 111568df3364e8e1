#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

#include "common/wide_loops.h"
#include "models/token_groups_body.h"

namespace routecast {

// Of float32 the loop that the compiler turns into vectors: the same operations. Product
// and sum stay apart, as in the other types.
ROUTECAST_WIDE static void AddScaledRow(const float* residual, const float* expert,
                                        float gate, int64_t width, float* out) {
  for (int64_t i = 0; i < width; ++i) out[i] = expert[i] * gate;
  for (int64_t i = 0; i < width; ++i) out[i] += residual[i];
}

namespace {

constexpr int64_t kGrain = 1 << 15;  // numbers that are worth a thread

template <class Row>
void ForRows(int64_t rows, int64_t width, const Row& row) {
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(width, 1)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t r = begin; r < end; ++r) row(r);
                   });
}

void ScatterFloatRow(const ScatterArgs& a, int64_t row) {
  if (a.place[row] < 0) return ScatterRow<float>(OneLane(), a, row);
  AddScaledRow(static_cast<const float*>(a.residual) + row * a.width,
               static_cast<const float*>(a.outputs) + a.place[row] * a.width,
               a.gates[row], a.width, static_cast<float*>(a.out) + row * a.width);
}

}  // namespace

void SortCpu(const SortArgs& args) {
  const OneLane one;
  for (int64_t t = 0; t < args.tiles(); ++t) CountTile(one, args, t);
  ScanTiles(one, args);
  for (int64_t t = 0; t < args.tiles(); ++t) PlaceTile(one, args, t);
}

void GatherCpu(const GatherArgs& args) {
  ForRows(args.rows, args.words, [&](int64_t row) {
    std::memcpy(static_cast<char*>(args.out) + row * args.words,
                static_cast<const char*>(args.x) + args.order[row] * args.words,
                static_cast<size_t>(args.words));
  });
}

void ScatterCpu(const ScatterArgs& args, int type) {
  ForRows(args.rows, args.width, [&](int64_t row) {
    if (type == 0) return ScatterFloatRow(args, row);
    if (type == 1) return ScatterRow<c10::BFloat16>(OneLane(), args, row);
    ScatterRow<c10::Half>(OneLane(), args, row);
  });
}

}  // namespace routecast
