#include <ATen/Parallel.h>

#include <algorithm>

#include "models/top1_body.h"

namespace routecast {
namespace {

constexpr int64_t kGrain = 1 << 14;  // numbers that are worth a thread

template <class Row>
void ForRows(int64_t rows, int64_t width, const Row& row) {
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(width, 1)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t r = begin; r < end; ++r) row(r);
                   });
}

}  // namespace

void Top1Cpu(const Top1Args& args, int router, int model) {
  VisitFloatType(router, [&](auto r) {
    VisitFloatType(model, [&](auto m) {
      ForRows(args.rows, args.experts, [&](int64_t row) {
        Top1Row<decltype(r), decltype(m)>(OneLane(), args, row);
      });
    });
  });
}

void DropCpu(const DropArgs& args) {
  ForRows(args.sequences, args.length,
          [&](int64_t sequence) { DropRow(OneLane(), args, sequence); });
}

}  // namespace routecast
