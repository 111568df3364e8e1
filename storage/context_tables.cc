#include "storage/context_tables.h"

#include <algorithm>
#include <array>
#include <bit>

#include "common/errors.h"
#include "common/random.h"

namespace routecast {
namespace {

constexpr uint64_t kFree = ~uint64_t{0};

uint64_t KeyOf(uint32_t outer, uint32_t inner) { return uint64_t{outer} << 32 | inner; }

}  // namespace

std::vector<uint32_t> BaseWeights(const std::vector<uint32_t>& marginal, const Row& row) {
  std::vector<uint64_t> wide(marginal.begin(), marginal.end());
  for (const RowEntry& entry : row) wide[entry.expert] *= FactorTimes(entry.factor);
  size_t next = 0;
  uint64_t sum = 0;
  for (size_t e = 0; e < wide.size(); ++e) {
    if (next < row.size() && row[next].expert == e) {
      ++next;
      wide[e] >>= 8;  // factors are in 1/65536: all weights in 1/256
    } else {
      wide[e] <<= 8;
    }
    sum += wide[e];
  }
  const auto spread = kBaseScale - static_cast<uint32_t>(wide.size());
  std::vector<uint32_t> weights(wide.size());
  uint32_t given = 0;
  for (size_t e = 0; e < wide.size(); ++e) {
    weights[e] = 1 + static_cast<uint32_t>(wide[e] * spread / std::max<uint64_t>(1, sum));
    given += weights[e];
  }
  *std::max_element(weights.begin(), weights.end()) += kBaseScale - given;
  return weights;
}

Row Compose(const Row& a, const Row& b) {
  Row row;
  size_t i = 0, j = 0;
  while (i < a.size() || j < b.size()) {
    const int left = i < a.size() ? a[i].expert : kMaxCodedExperts;
    const int right = j < b.size() ? b[j].expert : kMaxCodedExperts;
    RowEntry entry{static_cast<uint16_t>(std::min(left, right)), 0};
    int factor = 0;
    if (left <= right) factor += a[i++].factor;
    if (right <= left) factor += b[j++].factor;
    entry.factor = static_cast<int16_t>(std::clamp(factor, -kMaxFactor, kMaxFactor));
    row.push_back(entry);
  }
  return row;
}

void RequireModelSize(bool fits, const std::string& where, const char* what) {
  if (fits) return;
  throw DataError(ErrorText(where + ": the context model is too large", what,
                            "make the store with another --compression"));
}

ContextIndex::ContextIndex(const StackTables& tables)
    : keys_(std::bit_ceil(2 * tables.contexts.size() + 2), kFree), places_(keys_.size()) {
  uint32_t place = 0;
  for (const auto& context : tables.contexts) {
    const uint64_t key = KeyOf(context.outer, context.inner);
    size_t at = Mix(key) & (keys_.size() - 1);
    while (keys_[at] != kFree) at = (at + 1) & (keys_.size() - 1);
    keys_[at] = key;
    places_[at] = ++place;
  }
  size_t side = 0;
  for (const auto& context : tables.contexts) {
    side = std::max({side, RowOf(context.outer) + 1, RowOf(context.inner) + 1});
  }
  if (side * side > 64 * (tables.contexts.size() + 64)) return;
  side_ = side;
  for (size_t row = 0; row < side; ++row) {
    for (size_t column = 0; column < side; ++column) {
      square_.push_back(FindKey(NumberOf(row), NumberOf(column)));
    }
  }
}

uint32_t ContextIndex::FindKey(uint32_t outer, uint32_t inner) const {
  for (const uint32_t o : {outer, kAnyContext}) {
    const uint64_t key = KeyOf(o, inner);
    for (size_t at = Mix(key) & (keys_.size() - 1); keys_[at] != kFree;
         at = (at + 1) & (keys_.size() - 1)) {
      if (keys_[at] == key) return places_[at];
    }
  }
  return 0;
}

}  // namespace routecast
