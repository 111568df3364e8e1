#include "storage/factor_rows.h"

#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "common/wide_loops.h"

namespace routecast {
namespace {

// Eight lanes: what a compiler makes of them follows the function that they are in.
using Words = uint32_t __attribute__((vector_size(32)));
using Ints = int32_t __attribute__((vector_size(32)));
using Halves = uint16_t __attribute__((vector_size(16)));
using Shorts = int16_t __attribute__((vector_size(32)));
using HalfShorts = int16_t __attribute__((vector_size(16)));
using Bytes = int8_t __attribute__((vector_size(16)));
constexpr size_t kWords = 8;
static_assert(kLanes % kWords == 0 && kFactorSteps == kWords);

template <typename V>
[[gnu::always_inline]] inline void Load(const void* from, V* v) {
  std::memcpy(v, from, sizeof *v);
}

[[gnu::always_inline]] inline uint32_t SumOf(const Words& v) {
  Words sum = v + __builtin_shuffle(v, Words{4, 5, 6, 7, 0, 1, 2, 3});
  sum += __builtin_shuffle(sum, Words{2, 3, 0, 1, 6, 7, 4, 5});
  sum += __builtin_shuffle(sum, Words{1, 0, 3, 2, 5, 4, 7, 6});
  return sum[0];
}

// weights * FactorTimes(factors) / 2^16, at least 1 where there is a weight, without
// products of more than 32 bits.
[[gnu::always_inline]] inline void Scale(const Ints& factors, Words* weights) {
  Words mantissas;
  Load(kFactorMantissas.data(), &mantissas);
  const Words times = __builtin_shuffle(mantissas, (Words)(factors & (kFactorSteps - 1)));
  const Ints whole = factors >> 3, negative = whole >> 31;
  const Words down = (Words)(-whole & negative), up = (Words)(whole & ~negative);
  const Words scaled = (*weights * (times >> down)) >> (16 - up);
  const Words least = (Words)(*weights != 0) & 1;
  *weights = scaled > least ? scaled : least;
}

// kLanes base weights, or a row's factors for as many experts.
struct Weights {
  Words low, high;
};
struct Factors {
  Ints low, high;
};

[[gnu::always_inline]] inline void LoadBase(const uint16_t* base, Weights* weights) {
  Halves low, high;
  Load(base, &low);
  Load(base + kWords, &high);
  weights->low = __builtin_convertvector(low, Words);
  weights->high = __builtin_convertvector(high, Words);
}

[[gnu::always_inline]] inline void LoadDifferences(const uint16_t* cumulative,
                                                   Weights* weights) {
  Weights begin;
  LoadBase(cumulative, &begin);
  LoadBase(cumulative + 1, weights);
  weights->low -= begin.low;
  weights->high -= begin.high;
}

[[gnu::always_inline]] inline void LoadFactors(const int8_t* row, Factors* factors) {
  Bytes bytes;
  Load(row, &bytes);
  const Shorts all = __builtin_convertvector(bytes, Shorts);
  const HalfShorts low = __builtin_shufflevector(all, all, 0, 1, 2, 3, 4, 5, 6, 7);
  const HalfShorts high = __builtin_shufflevector(all, all, 8, 9, 10, 11, 12, 13, 14, 15);
  factors->low = __builtin_convertvector(low, Ints);
  factors->high = __builtin_convertvector(high, Ints);
}

// The weights of one vector after the other, as `make(e, &weights)` says, and their sums.
template <typename Make>
[[gnu::always_inline]] inline uint32_t ForAll(size_t padded, uint32_t* weights,
                                              uint32_t* sums, const Make& make) {
  uint32_t total = 0;
  for (size_t e = 0; e < padded; e += kLanes) {
    Weights made;
    make(e, &made);
    std::memcpy(weights + e, &made, sizeof made);
    total += sums[e / kLanes] = SumOf(made.low + made.high);
  }
  return total;
}

ROUTECAST_WIDE uint32_t WeighAll(const uint16_t* base, const int8_t* row, size_t padded,
                                 uint32_t* weights, uint32_t* sums) {
  return ForAll(padded, weights, sums, [&](size_t e, Weights* made) {
    Factors factors;
    LoadFactors(row + e, &factors);
    LoadBase(base + e, made);
    Scale(factors.low & (factors.low != FactorRows::kAbsent), &made->low);
    Scale(factors.high & (factors.high != FactorRows::kAbsent), &made->high);
  });
}

ROUTECAST_WIDE uint32_t Widen(const uint16_t* base, size_t padded, uint32_t* weights,
                              uint32_t* sums) {
  return ForAll(padded, weights, sums,
                [&](size_t e, Weights* made) { LoadBase(base + e, made); });
}

// Sets `own` to the base weights of the experts in the row.
ROUTECAST_WIDE uint32_t WeighOwn(const uint16_t* cumulative, const int8_t* row,
                                 size_t padded, uint32_t* weights, uint32_t* sums,
                                 uint32_t* own) {
  Words base = {};
  const uint32_t total = ForAll(padded, weights, sums, [&](size_t e, Weights* made) {
    Factors factors;
    LoadFactors(row + e, &factors);
    LoadDifferences(cumulative + e, made);
    made->low &= (Words)(factors.low != FactorRows::kAbsent);
    made->high &= (Words)(factors.high != FactorRows::kAbsent);
    base += made->low + made->high;
    Scale(factors.low, &made->low);
    Scale(factors.high, &made->high);
  });
  *own = SumOf(base);
  return total;
}

// Of the experts that are not in the row, as they are.
ROUTECAST_WIDE uint32_t WeighRest(const uint16_t* cumulative, const int8_t* row,
                                  size_t num_experts, uint32_t* weights, uint32_t* sums) {
  return ForAll(Padded(num_experts), weights, sums, [&](size_t e, Weights* made) {
    Factors factors;
    LoadFactors(row + e, &factors);
    LoadDifferences(cumulative + e, made);
    const Ints lanes = {0, 1, 2, 3, 4, 5, 6, 7};
    const auto inside = static_cast<int>(num_experts - e);
    made->low &= (Words)(~(factors.low != FactorRows::kAbsent) & (lanes < inside));
    made->high &=
        (Words)(~(factors.high != FactorRows::kAbsent) & (lanes < inside - int{kWords}));
  });
}

}  // namespace

FactorRows::FactorRows(const StackTables& tables, size_t share, const std::string& where,
                       const char* what)
    : num_layers_(tables.marginal.size()) {
  const size_t experts = num_layers_ == 0 ? 0 : tables.marginal[0].size();
  std::unordered_map<uint32_t, const StackTables::Context*> alone;
  for (const auto& context : tables.contexts) {
    if (context.outer == kAnyContext) alone[context.inner] = &context;
  }
  for (size_t l = 0; l < num_layers_; ++l) Add({}, experts, share);
  uint64_t factors = 0;
  for (const auto& context : tables.contexts) {
    const auto inner = alone.find(context.inner);
    const bool pair = context.outer != kAnyContext && inner != alone.end();
    for (size_t l = 0; l < num_layers_; ++l) {
      const Row row =
          pair ? Compose(inner->second->rows[l], context.rows[l]) : context.rows[l];
      factors += row.size();
      RequireModelSize(factors <= kMaxFactors, where, what);
      Add(row, experts, share);
    }
  }
}

void FactorRows::Add(const Row& row, size_t num_experts, size_t share) {
  if (row.size() * share < Padded(num_experts)) {
    heads_.push_back(static_cast<uint32_t>(entries_.size()));
    entries_.push_back({static_cast<uint16_t>(row.size()), 0});
    entries_.insert(entries_.end(), row.begin(), row.end());
    return;
  }
  heads_.push_back(static_cast<uint32_t>(vectors_) | kDense);
  const size_t begin = vectors_ * kLanes, bytes = Padded(num_experts);
  vectors_ += bytes / kLanes;
  lines_.resize((begin + bytes + sizeof(Line) - 1) / sizeof(Line));
  int8_t* to = reinterpret_cast<int8_t*>(lines_.data()) + begin;
  std::fill(to, to + bytes, kAbsent);
  for (const RowEntry& e : row) to[e.expert] = static_cast<int8_t>(e.factor);
}

void ExpertFrequencies::FillAll(const uint16_t* base, size_t padded,
                                const FactorRows::View& row) {
  if (row.dense != nullptr) {
    total_ = WeighAll(base, row.dense, padded, weights_.data(), sums_.data());
    return;
  }
  total_ = Widen(base, padded, weights_.data(), sums_.data());
  for (const RowEntry* e = row.first; e != row.last; ++e) {
    const auto scaled =
        static_cast<uint32_t>((uint64_t{base[e->expert]} * FactorTimes(e->factor)) >> 16);
    const uint32_t more = std::max<uint32_t>(1, scaled) - base[e->expert];
    weights_[e->expert] += more;
    sums_[e->expert / kLanes] += more;
    total_ += more;
  }
}

uint32_t ExpertFrequencies::FillOwn(const uint16_t* cumulative, size_t num_experts,
                                    const int8_t* dense) {
  uint32_t own = 0;
  total_ = WeighOwn(cumulative, dense, Padded(num_experts), weights_.data(), sums_.data(),
                    &own);
  return own;
}

void ExpertFrequencies::FillRest(const uint16_t* cumulative, size_t num_experts,
                                 const int8_t* dense) {
  total_ = WeighRest(cumulative, dense, num_experts, weights_.data(), sums_.data());
}

}  // namespace routecast
