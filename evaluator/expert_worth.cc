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
constexpr double kBarelyLess = 1 - 1e-12;  // what rounding may take from a worth
constexpr double kScoreError = 1e-6;       // ExpertCache::ScoreOfRate

}  // namespace

ExpertWorth::ExpertWorth(const ExpertCache* cache, const LayerTimeline* timeline,
                         const VisitForecasts* forecasts)
    : cache_(cache),
      timeline_(timeline),
      forecasts_(forecasts),
      least_rate_(kRateFloor / cache->geometry().num_experts),
      log_least_rate_(std::log(least_rate_)),
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
    outlook.floor = 0;
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
  for (int distance = 1; distance <= forecasts_->max_lead(); ++distance) {
    const VisitForecast* forecast = forecasts_->Find(timeline_->visit() + distance);
    if (!forecast || !forecast->trusted) continue;
    Outlook& outlook = outlooks_[static_cast<size_t>(forecast->layer)];
    outlook.foreseen.emplace_back(forecast, Power(distance));
    outlook.after = Power(distance + cycle_of(forecast->layer));
  }
  for (Outlook& outlook : outlooks_) {
    if (outlook.returns) outlook.floor = Tail(outlook, least_rate_);
  }
}

// The layer comes round again, and uses the key at its usual rate.
double ExpertWorth::Tail(const Outlook& outlook, double rate) const {
  return rate / (1 - (1 - rate) * outlook.cycle) * outlook.after;
}

double ExpertWorth::Beyond(const Outlook& outlook, ExpertKey key) const {
  if (!outlook.returns) return 0;
  const double rate = cache_->UseRate(key);
  return rate > least_rate_ ? Tail(outlook, rate) : outlook.floor;
}

double ExpertWorth::Of(const Outlook& outlook, ExpertKey key, double beyond) const {
  double missed = 1, worth = 0;  // probability of no use so far; worth of those foreseen
  for (const auto& [forecast, discount] : outlook.foreseen) {
    const double p = forecast->ProbabilityOf(key.expert);
    worth += missed * p * discount;
    missed *= 1 - p;
  }
  return worth + missed * beyond;
}

double ExpertWorth::Of(ExpertKey key) {
  if (stale_) Look();
  const Outlook& outlook = outlooks_[static_cast<size_t>(key.layer)];
  return Of(outlook, key, Beyond(outlook, key));
}

double ExpertWorth::Beyond(const Outlook& outlook, int layer,
                           const ExpertCache::Rank& rank) const {
  const bool hardly_used = rank.score < outlook.floor_score;
  return hardly_used ? outlook.floor : Beyond(outlook, ExpertKey{layer, rank.expert});
}

std::optional<ExpertWorth::Key> ExpertWorth::Least(std::span<const ExpertKey> kept) {
  if (stale_) Look();
  std::optional<Key> least;
  const bool any_pinned = cache_->num_pinned() > 0;
  const auto pinned = [&](ExpertKey key) { return any_pinned && cache_->pins(key) > 0; };
  const auto consider = [&](const Outlook& outlook, ExpertKey key, double beyond) {
    if (std::find(kept.begin(), kept.end(), key) != kept.end()) return;
    const double worth = Of(outlook, key, beyond);
    if (!least || worth < least->worth ||
        (worth == least->worth && cache_->LeavesBefore(key, least->key))) {
      least = {key, worth};
    }
  };
  // The first of every layer, then the others of the layers that may have a lesser one. A
  // use that is foreseen is worth more than one that comes later by habit: the habit
  // alone is the least that an expert can be worth. So the layer whose first has the
  // least of that is looked at first: what is foreseen of the others' lies in memory that
  // may be far away.
  int lowest = -1;
  const int layers = cache_->geometry().num_layers();
  for (int layer = 0; layer < layers; ++layer) {
    const auto ranks = cache_->HeldByRate(layer);
    Outlook& outlook = outlooks_[static_cast<size_t>(layer)];
    size_t i = 0;
    while (i < ranks.size() && pinned({layer, ranks[i].expert})) ++i;
    outlook.first_expert = -1;
    outlook.rest = ranks.subspan(std::min(i + 1, ranks.size()));
    if (i == ranks.size()) continue;
    outlook.floor_score = cache_->ScoreOfRate(layer, log_least_rate_) - kScoreError;
    outlook.first = Beyond(outlook, layer, ranks[i]);
    outlook.first_expert = ranks[i].expert;
    if (lowest < 0 || outlook.first < outlooks_[static_cast<size_t>(lowest)].first)
      lowest = layer;
  }
  if (lowest < 0) return std::nullopt;
  const auto consider_first = [&](int layer) {
    const Outlook& outlook = outlooks_[static_cast<size_t>(layer)];
    consider(outlook, {layer, outlook.first_expert}, outlook.first);
  };
  consider_first(lowest);
  for (int layer = 0; layer < layers; ++layer) {
    const Outlook& outlook = outlooks_[static_cast<size_t>(layer)];
    if (layer == lowest || outlook.first_expert < 0) continue;
    if (!least || outlook.first * kBarelyLess <= least->worth) consider_first(layer);
  }
  for (int layer = 0; layer < layers; ++layer) {
    const Outlook& outlook = outlooks_[static_cast<size_t>(layer)];
    if (outlook.rest.empty() || (least && outlook.first > least->worth)) continue;
    for (const ExpertCache::Rank& rank : outlook.rest) {
      const ExpertKey key{layer, rank.expert};
      if (pinned(key)) continue;
      const double beyond = Beyond(outlook, layer, rank);
      if (least && beyond > least->worth) break;
      consider(outlook, key, beyond);
    }
  }
  return least;
}

}  // namespace routecast
