// The rows of a context coder as they are used. Rows of many factors lie expert by
// expert, a byte each, so that wide vectors can go over them; the others as lists. Thread
// rule: immutable once made.
#pragma once

#include <cstdint>
#include <vector>

#include "storage/context_tables.h"

namespace routecast {

inline constexpr size_t kLanes = 16;
// Rows of base weights have zeros (or, cumulative, anything) up to whole vectors.
inline size_t Padded(size_t num_experts) {
  return (num_experts + kLanes - 1) / kLanes * kLanes;
}

class FactorRows {
 public:
  // In a row by experts: the expert is not in it.
  static constexpr int8_t kAbsent = -128;
  struct View {
    const RowEntry *first, *last;  // of a list
    const int8_t* dense;           // [E to whole vectors], or null: a list
    bool empty() const { return dense == nullptr && first == last; }
  };
  FactorRows() = default;
  // The rows of all contexts and layers; a pair's on top of inner's own. Rows of at least
  // a `share`-th of the experts are dense. Throws DataError naming `where` and `what`
  // above kMaxFactors.
  FactorRows(const StackTables& tables, size_t share, const std::string& where,
             const char* what);
  // `place`: a context's of ContextIndex; of 0 rows are empty.
  size_t Index(size_t place, size_t layer) const { return place * num_layers_ + layer; }
  View Get(size_t row) const {
    const uint32_t head = heads_[row];
    if (head & kDense) return {nullptr, nullptr, DenseAt(head & ~kDense)};
    const RowEntry* list = entries_.data() + head;
    return {list + 1, list + 1 + list->expert, nullptr};
  }
  // From memory to caches: first where the row is, some time later the row.
  void PrefetchHead(size_t row) const { __builtin_prefetch(heads_.data() + row); }
  void Prefetch(size_t row) const {
    const uint32_t head = heads_[row];
    const void* at = entries_.data() + head;
    if (head & kDense) at = DenseAt(head & ~kDense);
    __builtin_prefetch(at);
  }

 private:
  void Add(const Row& row, size_t num_experts, size_t share);
  static constexpr uint32_t kDense = 1u << 31;
  struct alignas(64) Line {
    int8_t factors[64];
  };
  const int8_t* DenseAt(uint32_t vectors) const {
    return reinterpret_cast<const int8_t*>(lines_.data()) + size_t{vectors} * kLanes;
  }
  std::vector<uint32_t> heads_;    // where a row begins: of entries_, or kDense + vectors
  std::vector<RowEntry> entries_;  // a list's length, in the place of an expert; the list
  std::vector<Line> lines_;
  size_t vectors_ = 0;
  size_t num_layers_ = 0;
};

}  // namespace routecast
