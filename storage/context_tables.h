// The tables that a store's context coders are made of: base weights, and rows of factors
// by context. Integers only: every machine computes the same.
// Thread rule: plain data and pure functions.
// Shape letters: L MoE layers of one stack, E experts.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace routecast {

inline constexpr int kMaxCodedExperts = 1024;
inline constexpr uint32_t kBaseScale = 1u << 15;  // sum of a base row's weights
// Log2 of a row's factor in steps of 1/8; both ways at most this many steps.
inline constexpr int kFactorSteps = 8, kMaxFactor = 15 * kFactorSteps;
// Ids a byte of a coded plane at most: bounds what a small hostile record can claim.
inline constexpr uint64_t kMaxIdsPerByte = 64;

inline constexpr uint32_t kAnyContext = 0xFFFFFFFFu;  // outer of a context of inner alone
inline constexpr uint32_t kNoContext = 0xFFFFFFFEu;   // before the first token or layer
struct ContextPair {
  uint32_t outer, inner;
};
struct RowEntry {
  uint16_t expert;
  int16_t factor;  // log2 in 1/kFactorSteps
};
using Row = std::vector<RowEntry>;  // ascending by expert

// 2^(i / kFactorSteps) in 1/65536.
inline constexpr std::array<uint32_t, kFactorSteps> kFactorMantissas = {
    65536, 71468, 77936, 84990, 92682, 101070, 110218, 120194};
// 2^(factor / kFactorSteps) in 1/65536. REQUIRES |factor| <= kMaxFactor.
inline uint32_t FactorTimes(int factor) {
  static constexpr auto kTimes = [] {
    std::array<uint32_t, 2 * kMaxFactor + 1> times{};
    for (int f = -kMaxFactor; f <= kMaxFactor; ++f) {
      const uint32_t mantissa =
          kFactorMantissas[static_cast<size_t>(f & (kFactorSteps - 1))];
      const int whole = f >> 3;
      times[static_cast<size_t>(f + kMaxFactor)] =
          whole >= 0 ? mantissa << whole : mantissa >> -whole;
    }
    return times;
  }();
  return kTimes[static_cast<size_t>(factor + kMaxFactor)];
}
// The base weights that `row` makes of a layer's marginal: each at least 1, sum
// kBaseScale.
std::vector<uint32_t> BaseWeights(const std::vector<uint32_t>& marginal, const Row& row);
// Both rows' factors together.
Row Compose(const Row& a, const Row& b);

// One stack as it is trained and stored: rows of differences.
struct StackTables {
  // [L][E] weights, each at least 1, sum kBaseScale.
  std::vector<std::vector<uint32_t>> marginal;
  // [L][E], to the marginal; of first choices none for layer 0.
  std::vector<std::vector<Row>> previous;
  struct Context {
    uint32_t outer, inner;
    std::vector<Row> rows;  // [L]; of a pair: on top of inner's own
  };
  std::vector<Context> contexts;  // ascending by (outer, inner)
};

// What a coder keeps in memory at most.
inline constexpr uint64_t kMaxFactors = uint64_t{1} << 25;    // 256 MiB
inline constexpr uint64_t kMaxBaseCells = uint64_t{1} << 27;  // 256 MiB
// DataError naming `where` and `what` unless `fits`.
void RequireModelSize(bool fits, const std::string& where, const char* what);

// The contexts of a stack's tables, found by their pair. Immutable once made.
class ContextIndex {
 public:
  ContextIndex() : ContextIndex(StackTables()) {}
  explicit ContextIndex(const StackTables& tables);
  // The place of the pair among the tables' contexts, counted from 1; where it has none,
  // inner's alone; 0 where that has none either.
  uint32_t Find(uint32_t outer, uint32_t inner) const {
    const size_t row = RowOf(outer), column = RowOf(inner);
    if (column < side_)
      return square_[(row < side_ ? row : RowOf(kAnyContext)) * side_ + column];
    return FindKey(outer, inner);
  }

 private:
  // kNoContext, kAnyContext, then the numbers.
  static size_t RowOf(uint32_t number) { return number + 2; }
  static uint32_t NumberOf(size_t row) { return static_cast<uint32_t>(row) - 2; }
  uint32_t FindKey(uint32_t outer, uint32_t inner) const;

  // Of small numbers (experts) the answers themselves, [side][side].
  size_t side_ = 0;
  std::vector<uint32_t> square_;
  std::vector<uint64_t> keys_;    // open addressing
  std::vector<uint32_t> places_;  // of a key's context, parallel to keys_
};

}  // namespace routecast
