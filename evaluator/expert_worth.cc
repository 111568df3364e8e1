#include "evaluator/expert_worth.h"

#include <algorithm>
#include <cmath>

namespace routecast {
namespace {

constexpr double kRateFloor = 0.125;  // of the uniform use rate, for experts never used
// Visits after which a slot's worth has fallen to 1/e: slots over this, about. Chosen
// like the lead's discount by planner_bench on validation sequences.
constexpr double kWorthSpan = 4;
constexpr int kPowers = 128;

}  // namespace

ExpertWorth::ExpertWorth(const ExpertCache* cache, const LayerTimeline* timeline,
                         const std::map<long, VisitForecast>* forecasts)
    : cache_(cache),
      timeline_(timeline),
      forecasts_(forecasts),
      outlooks_(static_cast<size_t>(cache->geometry().num_layers())) {
  SetSlots(cache->num_slots());
}

void ExpertWorth::SetSlots(int slots) {
  const double discount = 1 - kWorthSpan / (kWorthSpan + slots);
  powers_.resize(kPowers);
  for (int i = 0; i < kPowers; ++i)
    powers_[static_cast<size_t>(i)] = std::pow(discount, i);
  stale_ = true;
}

double ExpertWorth::Power(int visits) const {
  return visits < kPowers ? powers_[static_cast<size_t>(visits)]
                          : std::pow(powers_[1], visits);
}

void ExpertWorth::Look() {
  stale_ = false;
  const MoeGeometry& g = cache_->geometry();
  for (Outlook& outlook : outlooks_) {
    outlook.returns = false;
    outlook.foreseen.clear();
  }
  const auto cycle_of = [&](int layer) { return g.layers(g.StackOf(layer)); };
  int layer = timeline_->LayerAt(1);
  for (int distance = 1; distance <= g.num_layers() && layer >= 0; ++distance) {
    Outlook& outlook = outlooks_[static_cast<size_t>(layer)];
    if (!outlook.returns) {  // a layer may come round before the others have
      outlook.returns = true;
      outlook.after = Power(distance);
      outlook.cycle = Power(cycle_of(layer));
    }
    layer = timeline_->After(layer);
  }
  for (const auto& [visit, forecast] : *forecasts_) {
    const int distance = static_cast<int>(visit - timeline_->visit());
    Outlook& outlook = outlooks_[static_cast<size_t>(forecast.layer)];
    outlook.foreseen.emplace_back(forecast.probabilities.data(), Power(distance));
    outlook.after = Power(distance + cycle_of(forecast.layer));
  }
}

// The layer comes round again, and uses the key at its usual rate.
double ExpertWorth::Beyond(const Outlook& outlook, ExpertKey key) const {
  if (!outlook.returns) return 0;
  const double rate =
      std::max(cache_->UseRate(key), kRateFloor / cache_->geometry().num_experts);
  return rate / (1 - (1 - rate) * outlook.cycle) * outlook.after;
}

double ExpertWorth::Of(ExpertKey key) {
  if (stale_) Look();
  const Outlook& outlook = outlooks_[static_cast<size_t>(key.layer)];
  double missed = 1, worth = 0;  // probability of no use so far; worth of those foreseen
  for (const auto& [probabilities, discount] : outlook.foreseen) {
    const double p = probabilities[key.expert];
    worth += missed * p * discount;
    missed *= 1 - p;
  }
  return worth + missed * Beyond(outlook, key);
}

std::optional<ExpertKey> ExpertWorth::Least(std::span<const ExpertKey> kept) {
  if (stale_) Look();
  std::optional<ExpertKey> least;
  double least_worth = 0;
  for (int layer = 0; layer < cache_->geometry().num_layers(); ++layer) {
    const Outlook& outlook = outlooks_[static_cast<size_t>(layer)];
    for (const ExpertCache::Rank& rank : cache_->EvictableByRate(layer)) {
      const ExpertKey key{layer, rank.expert};
      // A use that is foreseen is worth more than one that comes later by habit: the
      // habit alone is the least that it can be worth.
      if (least && Beyond(outlook, key) > least_worth) break;
      if (std::find(kept.begin(), kept.end(), key) != kept.end()) continue;
      const double worth = Of(key);
      if (!least || worth < least_worth ||
          (worth == least_worth && cache_->LeavesBefore(key, *least))) {
        least = key;
        least_worth = worth;
      }
    }
  }
  return least;
}

}  // namespace routecast
