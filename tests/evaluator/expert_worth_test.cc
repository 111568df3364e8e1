// Who leaves, found in orders that are kept, against a look at every slot.
#include "evaluator/expert_worth.h"

#include <algorithm>
#include <cmath>

#include "common/random.h"
#include "gtest/gtest.h"

namespace routecast {
namespace {

constexpr MoeGeometry kGeometry{2, 3, 12, 1, 4};

// Layers run in order, experts come and go, are pinned, used and dropped.
class Life {
 public:
  Life(Eviction eviction, int slots, uint64_t seed)
      : cache(kGeometry, slots, eviction),
        timeline(kGeometry.num_layers()),
        later(&cache),
        worth(&cache, &timeline, &forecasts, &later),
        seed_(seed) {
    if (eviction != Eviction::kBelady) return;
    // The uses to come, drawn as Step will draw them.
    std::vector<ExpertKey> uses;
    for (uint64_t step = 0; step < 4000; ++step)
      for (ExpertKey key : Asked(step)) uses.push_back(key);
    cache.SetFuture(uses);
  }
  // Skewed, so that rates differ, and some experts are never asked for.
  std::vector<ExpertKey> Asked(uint64_t step) const {
    const int layer = static_cast<int>(step % 5);
    std::vector<ExpertKey> keys;
    for (uint64_t i = 0; i < 2; ++i) {
      const double u = ToUnit(Mix(seed_, step, i));
      const ExpertKey key{layer, static_cast<int>(u * u * 10)};
      if (keys.empty() || keys[0] != key) keys.push_back(key);
    }
    return keys;
  }
  void Step(uint64_t step) {
    const int layer = static_cast<int>(step % 5);
    timeline.Begin(layer, static_cast<double>(step), 0);
    cache.BeginLayer(layer);
    for (ExpertKey key : Asked(step)) {
      cache.Use(key);
      Bring(key);
    }
    Bring({static_cast<int>(Draw(step, 7, 5)), static_cast<int>(Draw(step, 8, 12))});
    for (int distance = 1; distance <= static_cast<int>(Draw(step, 9, 5)); ++distance) {
      VisitForecast& forecast = forecasts.Say(timeline.visit() + distance);
      forecast.layer = (layer + distance) % 5;
      forecast.kept.clear();
      for (uint64_t e = 0; e < 12; ++e) {
        const double u = ToUnit(Mix(seed_, step, 100 + 20 * distance + e));
        forecast.kept.push_back(static_cast<float>(u * u * u));
      }
      forecast.probabilities = forecast.kept;
    }
    const ExpertKey other{static_cast<int>(Draw(step, 11, 5)),
                          static_cast<int>(Draw(step, 12, 12))};
    if (cache.pins(other) > 0) {
      cache.Unpin(other);
    } else if (cache.state(other) == ExpertCache::State::kReady && Pinned() < 3) {
      cache.Pin(other);
    }
    later.Begin(layer);
    if (Draw(step, 13, 4) == 0) {  // of this layer's stack, for two turns
      std::vector<float> shares;
      for (uint64_t e = 0; e < 12; ++e)
        shares.push_back(static_cast<float>(ToUnit(Mix(seed_, step, 400 + e))) / 4);
      later.Say(layer, timeline.visit(), shares);
    }
    worth.Renew();
  }
  std::vector<ExpertKey> Keys() const {
    std::vector<ExpertKey> keys;
    for (int i = 0; i < kGeometry.num_keys(); ++i) {
      const ExpertKey key = ExpertKey::FromIndex(i, kGeometry);
      if (cache.Evictable(key)) keys.push_back(key);
    }
    return keys;
  }
  std::optional<ExpertKey> SlowVictim(const std::vector<ExpertKey>& kept) const {
    std::optional<ExpertKey> victim;
    for (ExpertKey key : Keys()) {
      if (std::count(kept.begin(), kept.end(), key) > 0) continue;
      if (!victim || cache.LeavesBefore(key, *victim)) victim = key;
    }
    return victim;
  }
  // The definition, with a power for every visit.
  double SlowWorth(ExpertKey key) {
    const double g = 1 - 4.0 / (4 + cache.num_slots());
    double missed = 1, sum = 0, last = 0;
    bool foreseen = false;
    for (int distance = 1; distance <= forecasts.max_lead(); ++distance) {
      const VisitForecast* forecast = forecasts.Find(timeline.visit() + distance);
      if (!forecast || forecast->layer != key.layer) continue;
      last = distance;
      const double p = forecast->probabilities[static_cast<size_t>(key.expert)];
      sum += missed * p * std::pow(g, last);
      missed *= 1 - p;
      foreseen = true;
    }
    const auto distance = timeline.DistanceTo(key.layer);
    if (!distance) return sum;
    const double cycle = kGeometry.layers(kGeometry.StackOf(key.layer));
    const LaterShares::Layer* told = later.Find(key.layer, timeline.visit());
    num_told += told != nullptr;
    const double used =
        told ? told->rate[static_cast<size_t>(key.expert)] : cache.UseRate(key);
    const double rate = std::max(used, 0.125 / kGeometry.num_experts);
    const double tail = rate / (1 - (1 - rate) * std::pow(g, cycle));
    return sum + missed * tail * std::pow(g, foreseen ? last + cycle : *distance);
  }

  ExpertCache cache;
  LayerTimeline timeline;
  VisitForecasts forecasts{4};
  LaterShares later;
  ExpertWorth worth;
  int num_told = 0;  // of SlowWorth's keys, those of whose layer something was said

 private:
  uint64_t Draw(uint64_t step, uint64_t what, uint64_t range) const {
    return ToRange(Mix(seed_, step, 1000 + what), range);
  }
  int Pinned() const {
    int pinned = 0;
    for (int i = 0; i < kGeometry.num_keys(); ++i)
      pinned += cache.pins(ExpertKey::FromIndex(i, kGeometry)) > 0;
    return pinned;
  }
  void Bring(ExpertKey key) {
    if (cache.state(key) != ExpertCache::State::kAbsent) return;
    if (cache.free_slots() == 0) cache.Drop(*SlowVictim({}));
    cache.Load(key);
    cache.Arrive(key);
  }
  uint64_t seed_;
};

// Long enough that an order is not kept up, and has to be sorted when it is asked for.
bool NobodyAsks(uint64_t step) { return step / 500 % 2 == 1; }

TEST(ExpertOrderTest, TheVictimIsThatOfALookAtEverySlot) {
  for (const Eviction eviction :
       {Eviction::kNone, Eviction::kLru, Eviction::kLfu, Eviction::kLfru,
        Eviction::kLeastStale, Eviction::kPhaseAware, Eviction::kBelady}) {
    Life life(eviction, 17, 5);
    for (uint64_t step = 0; step < 2600; ++step) {
      life.Step(step);
      if (NobodyAsks(step)) continue;
      std::vector<ExpertKey> kept;
      EXPECT_EQ(life.cache.Victim(), life.SlowVictim({}));
      if (life.cache.Victim()) kept.push_back(*life.cache.Victim());
      ASSERT_EQ(life.cache.Victim(kept), life.SlowVictim(kept))
          << EvictionName(eviction) << " at step " << step;
    }
  }
}

TEST(ExpertWorthTest, ValuesAreThoseOfTheDefinition) {
  Life life(Eviction::kLru, 17, 6);
  for (uint64_t step = 0; step < 1000; ++step) {
    life.Step(step);
    for (ExpertKey key : life.Keys())
      ASSERT_NEAR(life.worth.Of(key), life.SlowWorth(key), 1e-12) << step;
  }
  EXPECT_GT(life.num_told, 1000);
}

TEST(ExpertWorthTest, TheLeastIsThatOfALookAtEverySlot) {
  for (const Eviction eviction : {Eviction::kLru, Eviction::kLfu}) {
    Life life(eviction, 17, 7);
    for (uint64_t step = 0; step < 3600; ++step) {
      life.Step(step);
      if (NobodyAsks(step)) continue;
      const std::vector<ExpertKey> kept = life.Asked(step);
      std::optional<ExpertKey> slow;
      double least = 0;
      for (ExpertKey key : life.Keys()) {
        if (std::count(kept.begin(), kept.end(), key) > 0) continue;
        const double worth = life.worth.Of(key);
        if (!slow || worth < least ||
            (worth == least && life.cache.LeavesBefore(key, *slow))) {
          slow = key;
          least = worth;
        }
      }
      const auto found = life.worth.Least(kept);
      ASSERT_EQ(found.has_value(), slow.has_value()) << "step " << step;
      if (!found) continue;
      ASSERT_EQ(found->key, *slow) << "step " << step;
      ASSERT_EQ(found->worth, least) << "step " << step;
    }
  }
}

TEST(ExpertWorthTest, MoreSlotsSeeFarther) {
  Life life(Eviction::kLru, 17, 8);
  for (uint64_t step = 0; step < 50; ++step) life.Step(step);
  life.forecasts.Forget();
  life.worth.Renew();
  const ExpertKey key = life.Keys().front();
  const double before = life.worth.Of(key);
  life.worth.SetSlots(170);
  EXPECT_GT(life.worth.Of(key), before);
}

}  // namespace
}  // namespace routecast
