#include "evaluator/benefit_gauge.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace routecast {
namespace {

constexpr double kFresh = 0.6;  // share of the newest trial in the evidence
// Speculation must save this share of the waiting: what it reads in vain takes memory
// bandwidth from the model, which the gauge does not see.
constexpr double kLeastGain = 0.05;
// Standard errors that a difference must have. Steps that begin a sequence wait many
// times as long as others, and a short trial may hold more of them in one mode.
constexpr double kClear = 1.25;

// Without the longest eighth: steps that begin a sequence wait many times as long as
// others in either mode, and a trial may hold more of them in one.
std::vector<double> Usual(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  values.resize(values.size() - values.size() / 8);
  return values;
}

double Mean(const std::vector<double>& values) {
  const double sum = std::accumulate(values.begin(), values.end(), 0.0);
  return values.empty() ? 0 : sum / static_cast<double>(values.size());
}

// Squared standard error of the mean.
double MeanVariance(const std::vector<double>& values) {
  if (values.size() < 2) return 0;
  const double mean = Mean(values), count = static_cast<double>(values.size());
  double square = 0;
  for (double v : values) square += (v - mean) * (v - mean);
  return square / (count - 1) / count;
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

void BenefitGauge::Record(double seconds, bool may_begin, double asking) {
  if (in_trial_) {
    // The first step of a block still carries the other mode's cache.
    if (position_ % options_.block_steps != 0) {
      (Speculate() ? on_ : off_).push_back(seconds);
      if (Speculate()) asking_.push_back(asking);
    }
    if (++position_ % (2 * options_.block_steps) == 0 && IsHopeless()) return Decide();
    if (position_ % (2 * options_.trial_pairs * options_.block_steps) != 0) return;
    if (IsClear() || extensions_ >= options_.most_extensions) {
      Decide();
    } else {
      ++extensions_;
    }
    return;
  }
  position_ = std::min(position_ + 1, spell_);
  if (due() && may_begin) {
    position_ = 0;
    in_trial_ = true;
    spell_ = std::min(2 * spell_, options_.longest_spell);
  }
}

bool BenefitGauge::IsClear() const {
  const std::vector<double> on = Usual(on_), off = Usual(off_);
  const double gap = Mean(on) - (1 - kLeastGain) * Mean(off);
  return gap * gap >= kClear * kClear * (MeanVariance(on) + MeanVariance(off));
}

bool BenefitGauge::IsHopeless() const {
  const std::vector<double> asking = Usual(asking_), off = Usual(off_);
  const double gap = Mean(asking) - (1 - kLeastGain) * Mean(off);
  return gap > 0 &&
         gap * gap >= kClear * kClear * (MeanVariance(asking) + MeanVariance(off));
}

void BenefitGauge::Decide() {
  const double fresh = with_ == 0 && without_ == 0 ? 1 : kFresh;
  with_ += fresh * (Mean(Usual(on_)) - with_);
  without_ += fresh * (Mean(Usual(off_)) - without_);
  helps_ = with_ < (1 - kLeastGain) * without_;
  on_.clear();
  off_.clear();
  asking_.clear();
  in_trial_ = false;
  position_ = 0;
  extensions_ = 0;
}

}  // namespace routecast
