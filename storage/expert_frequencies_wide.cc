// The loops of expert_frequency_loops.h for AVX2.
#include "common/wide_loops.h"
#include "storage/expert_frequency_loops.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace routecast {
namespace {

constexpr int8_t kAbsent = FactorRows::kAbsent;

// Sixteen experts at a time, by hand: a compiler makes ten times as many instructions of
// vectors that it has to find itself.
#define ROUTECAST_AVX2 [[gnu::target("avx2"), gnu::always_inline]] inline

struct Pair {
  __m256i low, high;  // of experts 0..7 and 8..15
};

ROUTECAST_AVX2 __m256i LoadWhole(const uint16_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

ROUTECAST_AVX2 Pair WidenHalves(__m256i halves) {
  return {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(halves)),
          _mm256_cvtepu16_epi32(_mm256_extracti128_si256(halves, 1))};
}

ROUTECAST_AVX2 Pair LoadDifferences(const uint16_t* cumulative) {
  return WidenHalves(_mm256_sub_epi16(LoadWhole(cumulative + 1), LoadWhole(cumulative)));
}

ROUTECAST_AVX2 Pair LoadFactors(const int8_t* row) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row));
  return {_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))};
}

ROUTECAST_AVX2 __m256i IsAbsent(__m256i factors) {
  return _mm256_cmpeq_epi32(factors, _mm256_set1_epi32(kAbsent));
}

// ScaledOne, without products of more than 32 bits.
ROUTECAST_AVX2 __m256i Scaled(__m256i weights, __m256i factors) {
  const __m256i mantissas =
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kFactorMantissas.data()));
  const __m256i times = _mm256_permutevar8x32_epi32(mantissas, factors);  // low 3 bits
  const __m256i whole = _mm256_srai_epi32(factors, 3), zero = _mm256_setzero_si256();
  const __m256i down = _mm256_max_epi32(_mm256_sub_epi32(zero, whole), zero);
  const __m256i right =
      _mm256_sub_epi32(_mm256_set1_epi32(16), _mm256_max_epi32(whole, zero));
  const __m256i scaled = _mm256_srlv_epi32(
      _mm256_mullo_epi32(weights, _mm256_srlv_epi32(times, down)), right);
  return _mm256_max_epu32(scaled, _mm256_min_epu32(weights, _mm256_set1_epi32(1)));
}

ROUTECAST_AVX2 __m256i RunningSums(__m256i v) {
  v = _mm256_add_epi32(v, _mm256_slli_si256(v, 4));
  v = _mm256_add_epi32(v, _mm256_slli_si256(v, 8));
  const __m256i low_half_above = _mm256_permute2x128_si256(v, v, 0x08);
  return _mm256_add_epi32(v, _mm256_shuffle_epi32(low_half_above, 0xFF));
}

// Running sums that begin with `before`, which is in all lanes, as the last is in all
// lanes of what comes back.
ROUTECAST_AVX2 __m256i Accumulate(const Pair& weights, __m256i before, uint32_t* ends) {
  const __m256i last_lane = _mm256_set1_epi32(7);
  const __m256i low = RunningSums(weights.low);
  const __m256i both =
      _mm256_add_epi32(before, _mm256_permutevar8x32_epi32(low, last_lane));
  const __m256i high = _mm256_add_epi32(RunningSums(weights.high), both);
  auto* to = reinterpret_cast<__m256i*>(ends);
  _mm256_store_si256(to, _mm256_add_epi32(low, before));
  _mm256_store_si256(to + 1, high);
  return _mm256_permutevar8x32_epi32(high, last_lane);
}

ROUTECAST_AVX2 uint32_t SumOf(__m256i v) {
  const __m128i four =
      _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
  return static_cast<uint32_t>(
      _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xB1))));
}

[[gnu::target("avx2")]] void FillAll(const uint16_t* base, const int8_t* row,
                                     size_t padded, uint32_t* ends) {
  __m256i last = _mm256_setzero_si256();
  for (size_t e = 0; e < padded; e += kLanes) {
    Pair weights = WidenHalves(LoadWhole(base + e));
    if (row != nullptr) {
      const Pair factors = LoadFactors(row + e);
      weights.low =
          Scaled(weights.low, _mm256_andnot_si256(IsAbsent(factors.low), factors.low));
      weights.high =
          Scaled(weights.high, _mm256_andnot_si256(IsAbsent(factors.high), factors.high));
    }
    last = Accumulate(weights, last, ends + e);
  }
}

[[gnu::target("avx2")]] uint32_t FillOwn(const uint16_t* cumulative, size_t num_experts,
                                         const int8_t* row, uint32_t* ends) {
  const size_t padded = Padded(num_experts);
  __m256i last = _mm256_setzero_si256(), base = last;
  for (size_t e = 0; e < padded; e += kLanes) {
    const Pair factors = LoadFactors(row + e);
    Pair weights = LoadDifferences(cumulative + e);
    weights.low = _mm256_andnot_si256(IsAbsent(factors.low), weights.low);
    weights.high = _mm256_andnot_si256(IsAbsent(factors.high), weights.high);
    base = _mm256_add_epi32(base, _mm256_add_epi32(weights.low, weights.high));
    weights.low = Scaled(weights.low, factors.low);
    weights.high = Scaled(weights.high, factors.high);
    last = Accumulate(weights, last, ends + e);
  }
  return SumOf(base);
}

[[gnu::target("avx2")]] void FillRest(const uint16_t* cumulative, size_t num_experts,
                                      const int8_t* row, uint32_t* ends) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  __m256i last = _mm256_setzero_si256();
  for (size_t e = 0; e < num_experts; e += kLanes) {
    const Pair factors = LoadFactors(row + e);
    Pair weights = LoadDifferences(cumulative + e);
    const auto inside = static_cast<int>(num_experts - e);
    const __m256i low = _mm256_cmpgt_epi32(_mm256_set1_epi32(inside), lanes);
    const __m256i high = _mm256_cmpgt_epi32(_mm256_set1_epi32(inside - 8), lanes);
    weights.low =
        _mm256_and_si256(weights.low, _mm256_and_si256(low, IsAbsent(factors.low)));
    weights.high =
        _mm256_and_si256(weights.high, _mm256_and_si256(high, IsAbsent(factors.high)));
    last = Accumulate(weights, last, ends + e);
  }
}

[[gnu::target("avx2")]] void AddFrom(size_t first, uint32_t amount, size_t padded,
                                     uint32_t* ends) {
  const __m256i each = _mm256_set1_epi32(static_cast<int>(amount));
  const __m256i begin = _mm256_set1_epi32(static_cast<int>(first) - 1);
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (size_t e = first / 8 * 8; e < padded; e += 8) {
    auto* at = reinterpret_cast<__m256i*>(ends + e);
    const __m256i place = _mm256_add_epi32(lanes, _mm256_set1_epi32(static_cast<int>(e)));
    const __m256i more = _mm256_and_si256(each, _mm256_cmpgt_epi32(place, begin));
    _mm256_store_si256(at, _mm256_add_epi32(_mm256_load_si256(at), more));
  }
}

#undef ROUTECAST_AVX2

constexpr FrequencyLoops kWide = {FillAll, FillOwn, FillRest, AddFrom};

}  // namespace

const FrequencyLoops* WideFrequencyLoops() { return HasAvx2() ? &kWide : nullptr; }

}  // namespace routecast
#else
namespace routecast {

const FrequencyLoops* WideFrequencyLoops() { return nullptr; }

}  // namespace routecast
#endif
