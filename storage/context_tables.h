// The tables that a store's context coders are made of: base weights, and rows of factors
// by context. Integers only: every machine computes the same.
// Thread rule: plain data and pure functions.
// Shape letters: L MoE layers of one stack, E experts.
#pragma once

#include <cstdint>
#include <functional>
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

// 2^(factor / kFactorSteps) in 1/65536. REQUIRES |factor| <= kMaxFactor.
uint32_t FactorTimes(int factor);
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
  uint32_t Find(uint32_t outer, uint32_t inner) const;

 private:
  std::vector<uint64_t> keys_;    // open addressing
  std::vector<uint32_t> places_;  // of a key's context, parallel to keys_
};

// The rows of each context, layer by layer; a pair's on top of inner's own.
void ForEachRow(const StackTables& tables, const std::function<void(const Row&)>& row);

}  // namespace routecast
