#include "evaluator/benefit_gauge.h"

#include <algorithm>
#include <numeric>

namespace routecast {
namespace {

constexpr double kFresh = 0.6;  // share of the newest trial in the evidence
// Speculation must save this share of the waiting: what it reads in vain takes memory
// bandwidth from the model, which the gauge does not see.
constexpr double kLeastGain = 0.05;

double Mean(const std::vector<double>& values) {
  const double sum = std::accumulate(values.begin(), values.end(), 0.0);
  return values.empty() ? 0 : sum / static_cast<double>(values.size());
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
    if (position_ % options_.block_steps != 0)
      (Speculate() ? on_ : off_).push_back(seconds);
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
  const double fresh = with_ == 0 && without_ == 0 ? 1 : kFresh;
  with_ += fresh * (Mean(on_) - with_);
  without_ += fresh * (Mean(off_) - without_);
  helps_ = with_ < (1 - kLeastGain) * without_;
  on_.clear();
  off_.clear();
  in_trial_ = false;
  position_ = 0;
}

}  // namespace routecast
