#include "evaluator/benefit_gauge.h"

#include <algorithm>

namespace routecast {
namespace {

// Mean of the middle half: single outliers of a shared machine do not decide.
double Centre(std::vector<double> values) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const size_t cut = values.size() / 4;
  double sum = 0;
  for (size_t i = cut; i < values.size() - cut; ++i) sum += values[i];
  return sum / static_cast<double>(values.size() - 2 * cut);
}

}  // namespace

BenefitGauge::BenefitGauge(BenefitGaugeOptions options)
    : options_(options), spell_(options.first_spell) {}

bool BenefitGauge::Speculate() const {
  if (!in_trial_) return helps_;
  // ABBA order: a steady drift of the machine cancels.
  const int block = position_ / options_.block_steps;
  return block % 4 == 0 || block % 4 == 3;
}

void BenefitGauge::Record(double seconds) {
  if (in_trial_) {
    // The first step of a block still carries the other mode's cache.
    if (position_ % options_.block_steps != 0) (Speculate() ? on_ : off_).push_back(seconds);
    if (++position_ == 2 * options_.trial_pairs * options_.block_steps) Decide();
    return;
  }
  if (++position_ >= spell_) {
    position_ = 0;
    in_trial_ = true;
    spell_ = std::min(2 * spell_, options_.longest_spell);
  }
}

void BenefitGauge::Decide() {
  with_ = Centre(on_);
  without_ = Centre(off_);
  helps_ = with_ < without_;
  on_.clear();
  off_.clear();
  in_trial_ = false;
  position_ = 0;
}

}  // namespace routecast
