// The loops of top1_router.h, once for both devices; one group of lanes (lane_group.h) a
// row or sequence. Internal to top1_router*.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>

#include "models/lane_group.h"

namespace routecast {

// Pointers and sizes of one call; all of one device, contiguous.
struct Top1Args {
  const void* logits;  // [rows, experts] of the router's type
  int64_t rows, experts;
  int64_t* ids;    // [rows]
  void* gates;     // [rows] of the model's type
  float* margins;  // [rows]
};
struct DropArgs {
  const int64_t* ids;   // [sequences, length]
  const bool* counted;  // the same, or null: all
  int64_t sequences, length, experts, capacity;
  int* counts;    // [sequences, experts], zeros
  bool* dropped;  // [sequences, length]
};

template <class Router, class Model, class Group>
ROUTECAST_LANES void Top1Row(const Group& g, const Top1Args& a, int64_t row) {
  const Router* logits = static_cast<const Router*>(a.logits) + row * a.experts;
  TopTwo top;
  for (int64_t e = g.lane(); e < a.experts; e += g.size()) {
    top = Merged(top, {static_cast<float>(logits[e]), TopTwo().second});
  }
  top = g.Top(top);
  float sum = 0;
  for (int64_t e = g.lane(); e < a.experts; e += g.size()) {
    sum += std::exp(static_cast<float>(logits[e]) - top.first);
  }
  sum = g.Sum(sum);
  // Rounded as the reference rounds: to the router's type, then to the model's.
  const auto probability = [&](int64_t e) {
    const float p = std::exp(static_cast<float>(logits[e]) - top.first) / sum;
    return static_cast<Model>(static_cast<float>(static_cast<Router>(p)));
  };
  Placed best;
  for (int64_t e = g.lane(); e < a.experts; e += g.size()) {
    best = Better(best, {static_cast<float>(probability(e)), e});
  }
  best = g.Best(best);
  if (g.lane() != 0) return;
  // No number is the best of those that are none: the first, so that the id is valid.
  const int64_t id = best.place < a.experts ? best.place : 0;
  a.ids[row] = id;
  static_cast<Model*>(a.gates)[row] = probability(id);
  a.margins[row] = a.experts > 1 ? top.first - top.second : 0.0f;
}

template <class Group>
ROUTECAST_LANES void DropRow(const Group& g, const DropArgs& a, int64_t sequence) {
  int* counts = a.counts + sequence * a.experts;
  const int64_t first = sequence * a.length;
  for (int64_t t = 0; t < a.length; t += g.size()) {
    const int64_t i = t + g.lane();
    const bool inside = i < a.length;
    const bool counts_in = inside && (a.counted == nullptr || a.counted[first + i]);
    const int before = g.Claim(counts, counts_in ? a.ids[first + i] : -1);
    if (inside) a.dropped[first + i] = !counts_in || before >= a.capacity;
  }
}

// Bodies by type; `router` and `model` count fp32, bf16, fp16.
template <class Visit>
void VisitFloatType(int type, const Visit& visit) {
  if (type == 0) return visit(float());
  if (type == 1) return visit(c10::BFloat16());
  return visit(c10::Half());
}

void Top1Cpu(const Top1Args& args, int router, int model);
void Top1Cuda(const Top1Args& args, int router, int model);
void DropCpu(const DropArgs& args);
void DropCuda(const DropArgs& args);

}  // namespace routecast
