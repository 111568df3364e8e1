// Loops that a CPU thread runs alone and a warp of a GPU runs together: a body is written
// once over a group of lanes, so what a GPU computes is tested without one. A group gives
// lane(), size() and the functions below; every lane of it makes the same calls.
// No LibTorch, no CUDA headers.
#pragma once

#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define ROUTECAST_LANES __host__ __device__ inline
#else
#define ROUTECAST_LANES inline
#endif

namespace routecast {

// A number and where it stands. Of equal numbers the first place is better.
struct Placed {
  float value = -std::numeric_limits<float>::infinity();
  int64_t place = std::numeric_limits<int64_t>::max();
};
ROUTECAST_LANES Placed Better(const Placed& a, const Placed& b) {
  // Written so that what is no number is never better.
  return b.value > a.value || (b.value == a.value && b.place < a.place) ? b : a;
}

// The two largest numbers.
struct TopTwo {
  float first = -std::numeric_limits<float>::infinity();
  float second = -std::numeric_limits<float>::infinity();
};
ROUTECAST_LANES TopTwo Merged(const TopTwo& a, const TopTwo& b) {
  if (a.first >= b.first) return {a.first, a.second > b.first ? a.second : b.first};
  return {b.first, b.second > a.first ? b.second : a.first};
}

// The CPU's group: one lane. warp_cuda.h has the GPU's.
struct OneLane {
  int lane() const { return 0; }
  int size() const { return 1; }
  void Sync() const {}  // what lanes wrote is seen by all
  float Max(float v) const { return v; }
  float Sum(float v) const { return v; }
  Placed Best(const Placed& v) const { return v; }
  TopTwo Top(const TopTwo& v) const { return v; }
  // The sum over the lanes below; `sum` becomes that over all.
  int64_t SumBelow(int64_t v, int64_t* sum) const {
    *sum = v;
    return 0;
  }
  // counts[key] as if the lanes took turns in their order: each gets the number before
  // its own turn and adds one. A negative key takes no turn.
  int Claim(int* counts, int64_t key) const { return key < 0 ? 0 : counts[key]++; }
};

}  // namespace routecast
