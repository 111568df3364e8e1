#include <ATen/Parallel.h>

#include <algorithm>

#include "models/expert_gemv_body.h"

namespace routecast {
namespace {

constexpr int64_t kGrain = 1 << 16;  // products that are worth a thread

template <class T>
void Numbers(const GemvArgs& args) {
  at::parallel_for(0, args.tokens * args.columns,
                   std::max<int64_t>(1, kGrain / std::max<int64_t>(args.depth, 1)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) {
                       GemvNumber<T>(OneLane(), args, i);
                     }
                   });
}

}  // namespace

void GemvCpu(const GemvArgs& args, int type) {
  if (type == 0) return Numbers<float>(args);
  if (type == 1) return Numbers<c10::BFloat16>(args);
  Numbers<c10::Half>(args);
}

}  // namespace routecast
