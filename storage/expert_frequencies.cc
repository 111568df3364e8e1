#include "storage/expert_frequencies.h"

#include <algorithm>

#include "storage/expert_frequency_loops.h"

namespace routecast {
namespace {

constexpr int8_t kAbsent = FactorRows::kAbsent;

uint32_t ScaledOne(uint32_t weight, int factor) {
  const auto scaled =
      static_cast<uint32_t>((uint64_t{weight} * FactorTimes(factor)) >> 16);
  return std::max(scaled, std::min<uint32_t>(weight, 1));
}

uint32_t Difference(const uint16_t* cumulative, size_t e) {
  return static_cast<uint16_t>(cumulative[e + 1] - cumulative[e]);
}

// Running sums of weight(e).
template <typename Weight>
void Accumulate(size_t padded, uint32_t* ends, const Weight& weight) {
  uint32_t sum = 0;
  for (size_t e = 0; e < padded; ++e) ends[e] = sum += weight(e);
}

void FillAllScalar(const uint16_t* base, const int8_t* row, size_t padded,
                   uint32_t* ends) {
  Accumulate(padded, ends, [&](size_t e) -> uint32_t {
    const bool listed = row != nullptr && row[e] != kAbsent;
    return listed ? ScaledOne(base[e], row[e]) : base[e];
  });
}

uint32_t FillOwnScalar(const uint16_t* cumulative, size_t num_experts, const int8_t* row,
                       uint32_t* ends) {
  uint32_t own = 0;
  Accumulate(Padded(num_experts), ends, [&](size_t e) -> uint32_t {
    if (row[e] == kAbsent) return 0;
    own += Difference(cumulative, e);
    return ScaledOne(Difference(cumulative, e), row[e]);
  });
  return own;
}

void FillRestScalar(const uint16_t* cumulative, size_t num_experts, const int8_t* row,
                    uint32_t* ends) {
  Accumulate(Padded(num_experts), ends, [&](size_t e) -> uint32_t {
    return e < num_experts && row[e] == kAbsent ? Difference(cumulative, e) : 0;
  });
}

void AddFromScalar(size_t first, uint32_t amount, size_t padded, uint32_t* ends) {
  for (size_t e = first; e < padded; ++e) ends[e] += amount;
}

constexpr FrequencyLoops kScalar = {FillAllScalar, FillOwnScalar, FillRestScalar,
                                    AddFromScalar};

}  // namespace

const FrequencyLoops& ScalarFrequencyLoops() { return kScalar; }

const FrequencyLoops& ChosenFrequencyLoops() {
  static const FrequencyLoops* const wide = WideFrequencyLoops();
  return wide != nullptr ? *wide : kScalar;
}

ExpertFrequencies::ExpertFrequencies() : ExpertFrequencies(ChosenFrequencyLoops()) {}

void ExpertFrequencies::FillAll(const uint16_t* base, size_t padded,
                                const FactorRows::View& row) {
  padded_ = padded;
  loops_->fill_all(base, row.dense, padded, ends());
  if (row.dense != nullptr) return;
  for (const RowEntry* e = row.first; e != row.last; ++e) {
    const uint32_t scaled = std::max<uint32_t>(1, ScaledOne(base[e->expert], e->factor));
    AddFrom(e->expert, scaled - base[e->expert]);
  }
}

uint32_t ExpertFrequencies::FillOwn(const uint16_t* cumulative, size_t num_experts,
                                    const int8_t* dense) {
  padded_ = Padded(num_experts);
  return loops_->fill_own(cumulative, num_experts, dense, ends());
}

void ExpertFrequencies::FillRest(const uint16_t* cumulative, size_t num_experts,
                                 const int8_t* dense) {
  padded_ = Padded(num_experts);
  loops_->fill_rest(cumulative, num_experts, dense, ends());
}

void ExpertFrequencies::AddFrom(uint16_t expert, uint32_t amount) {
  loops_->add_from(expert, amount, padded_, ends());
}

}  // namespace routecast
