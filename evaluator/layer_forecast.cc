#include "evaluator/layer_forecast.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>

#include "common/wide_loops.h"

namespace routecast {
namespace {

constexpr int kBlock = 32;

ROUTECAST_WIDE void Clean(float* p, int count) {
  constexpr float kMost = std::numeric_limits<float>::max();
  for (int i = 0; i < count; ++i) {
    const float sound = p[i] <= kMost ? p[i] : 0.f;
    const float low = sound > 0.f ? sound : 0.f;
    p[i] = low < 1.f ? low : 1.f;
  }
}

// Bits of floats in [0, 1] are in the numbers' order, and all others' are higher.
uint32_t BitsOf(float p) { return std::bit_cast<uint32_t>(p); }

// Bit i of marked[b]: number i of block b has `from` bits or more.
ROUTECAST_WIDE void Mark(const float* p, int blocks, uint32_t from, uint32_t* marked) {
  for (int b = 0; b < blocks; ++b) {
    uint32_t bits = 0;
    for (uint32_t i = 0; i < kBlock; ++i)
      bits |= BitsOf(p[b * kBlock + static_cast<int>(i)]) >= from ? 1u << i : 0u;
    marked[b] = bits;
  }
}

}  // namespace

void MakeProbabilities(std::vector<float>* numbers) {
  Clean(numbers->data(), static_cast<int>(numbers->size()));
}

bool RankExperts(std::span<const float> probabilities, float least,
                 std::vector<ForetoldExpert>* ranked) {
  constexpr int kBlocks = 16;
  ranked->clear();
  const float* p = probabilities.data();
  const int count = static_cast<int>(probabilities.size());
  const uint32_t one = BitsOf(1.f), from = BitsOf(least > 0 ? least : 0.f);
  // What is no probability is marked as well.
  const auto take = [&](int i) {
    if (BitsOf(p[i]) >= from) ranked->push_back({i, p[i]});
    return BitsOf(p[i]) <= one;
  };
  int i = 0;
  while (count - i >= kBlock) {
    uint32_t marked[kBlocks];
    const int blocks = std::min(kBlocks, (count - i) / kBlock);
    Mark(p + i, blocks, std::min(from, one), marked);
    for (int b = 0; b < blocks; ++b, i += kBlock) {
      for (uint32_t bits = marked[b]; bits != 0; bits &= bits - 1) {
        if (!take(i + std::countr_zero(bits))) return false;
      }
    }
  }
  for (; i < count; ++i) {
    if (!take(i)) return false;
  }
  if (ranked->size() > 1) {
    std::sort(ranked->begin(), ranked->end(),
              [](const ForetoldExpert& a, const ForetoldExpert& b) {
                return a.probability != b.probability ? a.probability > b.probability
                                                      : a.expert < b.expert;
              });
  }
  return true;
}

}  // namespace routecast
