#include "evaluator/expert_worth.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace routecast {
namespace {

constexpr double kRateFloor = 0.125;  // of the uniform use rate, for experts never used
// Visits after which a slot's worth has fallen to 1/e: slots over this, about, and over
// the experts that a visit takes. Chosen like the lead's discount by planner_bench on
// validation sequences.
constexpr double kWorthSpan = 4;
constexpr int kPowers = 128;
constexpr double kBarelyLess = 1 - 1e-12;  // what rounding may take from a worth
constexpr double kScoreError = 1e-6;       // ExpertCache::ScoreOfRate

}  // namespace

ExpertWorth::ExpertWorth(const ExpertCache* cache, const LayerTimeline* timeline,
                         const VisitForecasts* forecasts, const LaterShares* later)
    : cache_(cache),
      timeline_(timeline),
      forecasts_(forecasts),
      later_(later),
      least_rate_(kRateFloor * cache->geometry().experts_per_token /
                  cache->geometry().num_experts),
      log_least_rate_(std::log(least_rate_)),
      outlooks_(static_cast<size_t>(cache->geometry().num_layers())) {
  SetSlots(cache->num_slots());
}

void ExpertWorth::SetSlots(int slots) {
  const double span = kWorthSpan * cache_->geometry().experts_per_token;
  const double discount = 1 - span / (span + slots);
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
  for (const int seen : seen_) {
    Outlook& outlook = outlooks_[static_cast<size_t>(seen)];
    outlook.returns = false;
    outlook.floor = 0;
    outlook.foreseen.clear();
  }
  seen_.clear();
  const auto cycle_of = [&](int layer) { return g.layers(g.StackOf(layer)); };
  int layer = timeline_->LayerAt(1);
  for (int distance = 1; distance <= g.num_layers() && layer >= 0; ++distance) {
    Outlook& outlook = outlooks_[static_cast<size_t>(layer)];
    if (!outlook.returns) {  // a layer may come round before the others have
      outlook.returns = true;
      seen_.push_back(layer);
      outlook.after = Power(distance);
      outlook.cycle = Power(cycle_of(layer));
    }
    layer = timeline_->After(layer);
  }
  for (int distance = 1; distance <= forecasts_->max_lead(); ++distance) {
    const VisitForecast* forecast = forecasts_->Find(timeline_->visit() + distance);
    if (!forecast || !forecast->trusted) continue;
    Outlook& outlook = outlooks_[static_cast<size_t>(forecast->layer)];
    if (!outlook.returns && outlook.foreseen.empty()) seen_.push_back(forecast->layer);
    outlook.foreseen.emplace_back(forecast, Power(distance));
    outlook.after = Power(distance + cycle_of(forecast->layer));
  }
  for (const int seen : seen_) {
    Outlook& outlook = outlooks_[static_cast<size_t>(seen)];
    if (outlook.returns) outlook.floor = Tail(outlook, least_rate_);
  }
  const bool later = std::exchange(heeds_later_, later_->any());
  for (int l = 0; l < g.num_layers() && (later || heeds_later_); ++l)
    outlooks_[static_cast<size_t>(l)].later = later_->Find(l, timeline_->visit());
}

// The layer comes round again, and uses the key at its usual rate.
double ExpertWorth::Tail(const Outlook& outlook, double rate) const {
  return rate / (1 - (1 - rate) * outlook.cycle) * outlook.after;
}

double ExpertWorth::Beyond(const Outlook& outlook, ExpertKey key) const {
  if (!outlook.returns) return 0;
  const double rate = outlook.later ? outlook.later->rate[static_cast<size_t>(key.expert)]
                                    : cache_->UseRate(key);
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

struct ExpertWorth::Search {
  const ExpertWorth& of;
  std::span<const ExpertKey> kept;
  bool any_pinned;
  std::optional<Key> least{};

  bool Pinned(ExpertKey key) const { return any_pinned && of.cache_->pins(key) > 0; }
  bool Settled(double beyond) const { return least && beyond > least->worth; }
  void Consider(const Outlook& outlook, ExpertKey key, double beyond) {
    if (std::find(kept.begin(), kept.end(), key) != kept.end()) return;
    const double worth = of.Of(outlook, key, beyond);
    if (!least || worth < least->worth ||
        (worth == least->worth && of.cache_->LeavesBefore(key, least->key))) {
      least = {key, worth};
    }
  }
};

void ExpertWorth::FindFirst(int layer, const Search& search) {
  Outlook& outlook = outlooks_[static_cast<size_t>(layer)];
  outlook.first_expert = -1;
  outlook.rest = {};
  outlook.later_rest = {};
  size_t i = 0;
  if (outlook.later) {
    const std::span<const int> rising = outlook.later->rising;
    while (i < rising.size() && !cache_->Evictable({layer, rising[i]})) ++i;
    if (i == rising.size()) return;
    outlook.first_expert = rising[i];
    outlook.later_rest = rising.subspan(i + 1);
    outlook.first = Beyond(outlook, ExpertKey{layer, outlook.first_expert});
    return;
  }
  const auto ranks = cache_->HeldByRate(layer);
  while (i < ranks.size() && search.Pinned({layer, ranks[i].expert})) ++i;
  if (i == ranks.size()) return;
  outlook.first_expert = ranks[i].expert;
  outlook.rest = ranks.subspan(i + 1);
  outlook.floor_score = cache_->ScoreOfRate(layer, log_least_rate_) - kScoreError;
  outlook.first = Beyond(outlook, layer, ranks[i]);
}

void ExpertWorth::LookAtRest(int layer, Search* search) const {
  const Outlook& outlook = outlooks_[static_cast<size_t>(layer)];
  for (const ExpertCache::Rank& rank : outlook.rest) {
    const ExpertKey key{layer, rank.expert};
    if (search->Pinned(key)) continue;
    const double beyond = Beyond(outlook, layer, rank);
    if (search->Settled(beyond)) return;
    search->Consider(outlook, key, beyond);
  }
  for (const int expert : outlook.later_rest) {
    const ExpertKey key{layer, expert};
    if (!cache_->Evictable(key)) continue;
    const double beyond = Beyond(outlook, key);
    if (search->Settled(beyond)) return;
    search->Consider(outlook, key, beyond);
  }
}

std::optional<ExpertWorth::Key> ExpertWorth::Least(std::span<const ExpertKey> kept) {
  if (stale_) Look();
  Search search{*this, kept, cache_->num_pinned() > 0};
  // The first of every layer, then the others of the layers that may have a lesser one. A
  // use that is foreseen is worth more than one that comes later by habit: the habit
  // alone is the least that an expert can be worth. So the layer whose first has the
  // least of that is looked at first: what is foreseen of the others' lies in memory that
  // may be far away.
  int lowest = -1;
  const int layers = cache_->geometry().num_layers();
  for (int layer = 0; layer < layers; ++layer) {
    FindFirst(layer, search);
    const Outlook& outlook = outlooks_[static_cast<size_t>(layer)];
    if (outlook.first_expert < 0) continue;
    if (lowest < 0 || outlook.first < outlooks_[static_cast<size_t>(lowest)].first)
      lowest = layer;
  }
  if (lowest < 0) return std::nullopt;
  const auto consider_first = [&](int layer) {
    const Outlook& outlook = outlooks_[static_cast<size_t>(layer)];
    search.Consider(outlook, {layer, outlook.first_expert}, outlook.first);
  };
  consider_first(lowest);
  for (int layer = 0; layer < layers; ++layer) {
    const Outlook& outlook = outlooks_[static_cast<size_t>(layer)];
    if (layer == lowest || outlook.first_expert < 0) continue;
    if (!search.Settled(outlook.first * kBarelyLess)) consider_first(layer);
  }
  for (int layer = 0; layer < layers; ++layer) {
    const Outlook& outlook = outlooks_[static_cast<size_t>(layer)];
    const bool none = outlook.rest.empty() && outlook.later_rest.empty();
    if (!none && !search.Settled(outlook.first)) LookAtRest(layer, &search);
  }
  return search.least;
}

}  // namespace routecast
