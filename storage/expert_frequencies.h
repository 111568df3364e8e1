// The weights that a row of factors makes of base weights, in the order of experts, as a
// range coder asks for them: where an expert's begin, and on which expert a place falls.
// Thread rule: an object belongs to one thread.
// Shape letters: E experts.
#pragma once

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include <array>
#include <cstdint>

#include "storage/factor_rows.h"

namespace routecast {

struct FrequencyLoops;

class ExpertFrequencies {
 public:
  ExpertFrequencies();  // as wide as the machine's vectors
  // No more is set: one is made a record.
  explicit ExpertFrequencies(const FrequencyLoops& loops) : loops_(&loops) {
    ends_[kLanes - 1] = 0;
  }
  // `base` [E to whole vectors] times the row; experts that it lacks as they are.
  void FillAll(const uint16_t* base, size_t padded, const FactorRows::View& row);
  // `cumulative` base weights [E + 1 to whole vectors], times a dense row; experts that
  // it lacks have none. Returns the base weights of those that it has.
  uint32_t FillOwn(const uint16_t* cumulative, size_t num_experts, const int8_t* dense);
  // The base weights of the experts that the row lacks, the others none.
  void FillRest(const uint16_t* cumulative, size_t num_experts, const int8_t* dense);

  uint32_t total() const { return ends()[padded_ - 1]; }
  uint32_t StartOf(uint16_t expert) const { return ends_[kLanes - 1 + expert]; }
  uint32_t weight(uint16_t expert) const { return ends()[expert] - StartOf(expert); }
  void Remove(uint16_t expert) { AddFrom(expert, 0 - weight(expert)); }
  // The expert that `at` < total() falls on.
  uint16_t Locate(uint32_t at) const {
    const uint32_t* block = ends();
    while (block[kLanes - 1] <= at) block += kLanes;
    return static_cast<uint16_t>(block - ends() + FirstAbove(block, at));
  }

 private:
  const uint32_t* ends() const { return ends_.data() + kLanes; }
  uint32_t* ends() { return ends_.data() + kLanes; }
  // To the ends of this expert and those behind it.
  void AddFrom(uint16_t expert, uint32_t amount);
  // Which of kLanes ascending numbers is the first above `at`; one of them is. Without a
  // branch: none could be foretold.
#if defined(__x86_64__)
  static int FirstAbove(const uint32_t* block, uint32_t at) {
    const auto* from = reinterpret_cast<const __m128i*>(block);
    const __m128i all = _mm_set1_epi32(static_cast<int>(at));  // below 2^31, as the ends
    const __m128i low = _mm_packs_epi32(_mm_cmpgt_epi32(_mm_load_si128(from), all),
                                        _mm_cmpgt_epi32(_mm_load_si128(from + 1), all));
    const __m128i high = _mm_packs_epi32(_mm_cmpgt_epi32(_mm_load_si128(from + 2), all),
                                         _mm_cmpgt_epi32(_mm_load_si128(from + 3), all));
    return __builtin_ctz(
        static_cast<unsigned>(_mm_movemask_epi8(_mm_packs_epi16(low, high))));
  }
#else
  static int FirstAbove(const uint32_t* block, uint32_t at) {
    int first = 0;
    for (size_t j = 0; j + 1 < kLanes; ++j) first += block[j] <= at;
    return first;
  }
#endif

  // Where the weights of each expert end; before them a vector whose last lane is 0.
  alignas(64) std::array<uint32_t, kLanes + kMaxCodedExperts> ends_;
  size_t padded_ = kLanes;
  const FrequencyLoops* loops_;
};

}  // namespace routecast
