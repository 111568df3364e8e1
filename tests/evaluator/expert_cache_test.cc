#include "evaluator/expert_cache.h"

#include <algorithm>
#include <list>

#include "common/errors.h"
#include "common/random.h"
#include "gtest/gtest.h"

namespace routecast {
namespace {

MoeGeometry Geometry(int encoder, int decoder, int experts) {
  return {encoder, decoder, experts, 1, 8};
}

// One use of `key` on demand: hit or load, evicting where full. True = hit.
bool Access(ExpertCache* cache, ExpertKey key) {
  const bool hit = cache->state(key) == ExpertCache::State::kReady;
  if (!hit) {
    if (cache->free_slots() == 0) cache->Drop(*cache->Victim());
    cache->Load(key);
    cache->Arrive(key);
  }
  cache->Use(key);
  return hit;
}

std::vector<ExpertKey> RandomUses(const MoeGeometry& g, uint64_t seed, int count) {
  std::vector<ExpertKey> uses;
  for (int i = 0; i < count; ++i) {
    // Squared: some experts are hot.
    const double u = ToUnit(Mix(seed, i, 1));
    uses.push_back({i % g.num_layers(), static_cast<int>(u * u * g.num_experts)});
  }
  return uses;
}

// Used at a hundred visits, then at 32 no more.
TEST(ExpertCacheTest, UseRatesReachBackLessWhereTokensTakeSeveralExperts) {
  const auto rate = [](int chosen) {
    ExpertCache cache({0, 1, 4, chosen, 8}, 4, Eviction::kLru);
    for (int visit = 0; visit < 132; ++visit) {
      cache.BeginLayer(0);
      if (visit < 100) cache.Use({0, 1});
    }
    return cache.UseRate({0, 1});
  };
  EXPECT_NEAR(rate(1), 0.709, 0.001);  // of the last 256 or so
  EXPECT_NEAR(rate(2), 0.127, 0.001);  // of the last 16
}

TEST(ExpertCacheTest, LruAgreesWithANaiveList) {
  const MoeGeometry g = Geometry(1, 2, 9);
  for (uint64_t seed = 0; seed < 20; ++seed) {
    ExpertCache cache(g, 7, Eviction::kLru);
    std::list<ExpertKey> naive;  // most recent first
    for (ExpertKey key : RandomUses(g, seed, 2000)) {
      cache.BeginLayer(key.layer);
      const auto it = std::find(naive.begin(), naive.end(), key);
      const bool expected = it != naive.end();
      if (expected) naive.erase(it);
      naive.push_front(key);
      if (naive.size() > 7) naive.pop_back();
      ASSERT_EQ(Access(&cache, key), expected);
    }
  }
}

// The rules as they are said, from a list of all uses.
class NaiveCache {
 public:
  NaiveCache(const MoeGeometry& g, size_t slots, Eviction eviction)
      : g_(g), slots_(slots), eviction_(eviction) {}
  bool Access(ExpertKey key) {
    layers_.push_back(key.layer);
    const bool hit = std::find(held_.begin(), held_.end(), key) != held_.end();
    if (!hit && held_.size() == slots_) {
      held_.erase(std::min_element(
          held_.begin(), held_.end(),
          [this](ExpertKey a, ExpertKey b) { return PlaceOf(a) < PlaceOf(b); }));
    }
    if (!hit) held_.push_back(key);
    uses_.emplace_back(layers_.size(), key);
    return hit;
  }

 private:
  struct Place {  // the lower, the sooner it leaves
    double first = 0, second = 0;
    size_t last_use = 0;
    ExpertKey key;
    auto operator<=>(const Place&) const = default;
  };
  Place PlaceOf(ExpertKey key) const {
    Place place{0, 0, 0, key};
    double uses = 0;
    size_t visit = 0;
    for (size_t i = 0; i < uses_.size(); ++i) {
      if (uses_[i].second != key) continue;
      ++uses;
      place.last_use = i;
      visit = uses_[i].first;
    }
    const int running = layers_.back();
    const bool same_stack = g_.StackOf(key.layer) == g_.StackOf(running);
    if (eviction_ == Eviction::kLfu) place.first = uses;
    if (eviction_ == Eviction::kLfru)
      place.first = uses / static_cast<double>(layers_.size() - visit + 1);
    if (eviction_ == Eviction::kLeastStale) {
      const auto latest = std::find(layers_.rbegin(), layers_.rend(), key.layer);
      place.first = visit == static_cast<size_t>(layers_.rend() - latest);
      int ahead = 1;  // its turn, where the stack's layers run round and round
      const int layers = g_.layers(g_.StackOf(key.layer));
      while ((g_.LayerInStack(running) + ahead) % layers != g_.LayerInStack(key.layer))
        ++ahead;
      place.second = same_stack ? -ahead : -1000;
    }
    if (eviction_ == Eviction::kPhaseAware) {
      const bool encoder = g_.StackOf(key.layer) == Stack::kEncoder;
      place.first = encoder && key.layer <= running ? 0 : !same_stack ? 1 : 2;
    }
    return place;
  }
  MoeGeometry g_;
  size_t slots_;
  Eviction eviction_;
  std::vector<int> layers_;  // by visit, which count from 1
  std::vector<std::pair<size_t, ExpertKey>> uses_;
  std::vector<ExpertKey> held_;
};

TEST(ExpertCacheTest, TheOtherRulesAgreeWithAListOfAllUses) {
  const MoeGeometry g = Geometry(2, 3, 9);
  for (Eviction eviction : {Eviction::kLru, Eviction::kLfu, Eviction::kLfru,
                            Eviction::kLeastStale, Eviction::kPhaseAware}) {
    for (uint64_t seed = 0; seed < 10; ++seed) {
      ExpertCache cache(g, 9, eviction);
      NaiveCache naive(g, 9, eviction);
      for (ExpertKey key : RandomUses(g, seed, 600)) {
        cache.BeginLayer(key.layer);
        ASSERT_EQ(Access(&cache, key), naive.Access(key)) << EvictionName(eviction);
      }
    }
  }
}

int Misses(const MoeGeometry& g, const std::vector<ExpertKey>& uses, Eviction eviction,
           int slots) {
  ExpertCache cache(g, slots, eviction);
  if (eviction == Eviction::kBelady) cache.SetFuture(uses);
  int misses = 0;
  for (ExpertKey key : uses) {
    cache.BeginLayer(key.layer);
    misses += !Access(&cache, key);
  }
  return misses;
}

// The fewest misses by trying every choice of victim (no bypass).
int FewestMisses(const std::vector<int>& uses, size_t at, std::vector<int> held,
                 size_t slots) {
  for (; at < uses.size(); ++at) {
    if (std::find(held.begin(), held.end(), uses[at]) != held.end()) continue;
    if (held.size() < slots) {
      held.push_back(uses[at]);
      return 1 + FewestMisses(uses, at + 1, held, slots);
    }
    int best = 1 << 30;
    for (size_t victim = 0; victim < slots; ++victim) {
      std::vector<int> next = held;
      next[victim] = uses[at];
      best = std::min(best, 1 + FewestMisses(uses, at + 1, next, slots));
    }
    return best;
  }
  return 0;
}

TEST(ExpertCacheTest, BeladyAgreesWithExhaustiveSearch) {
  const MoeGeometry g = Geometry(0, 1, 5);
  for (uint64_t seed = 0; seed < 30; ++seed) {
    const std::vector<ExpertKey> uses = RandomUses(g, seed, 14);
    std::vector<int> ids;
    for (ExpertKey key : uses) ids.push_back(key.expert);
    EXPECT_EQ(Misses(g, uses, Eviction::kBelady, 3), FewestMisses(ids, 0, {}, 3));
  }
}

TEST(ExpertCacheTest, NoPolicyBeatsBelady) {
  const MoeGeometry g = Geometry(2, 2, 8);
  const std::vector<ExpertKey> uses = RandomUses(g, 3, 3000);
  const int least = Misses(g, uses, Eviction::kBelady, 8);
  for (Eviction e : {Eviction::kLru, Eviction::kLfu, Eviction::kLfru,
                     Eviction::kLeastStale, Eviction::kPhaseAware}) {
    EXPECT_GE(Misses(g, uses, e, 8), least) << EvictionName(e);
  }
}

TEST(ExpertCacheTest, LfuKeepsTheHotExpert) {
  ExpertCache cache(Geometry(0, 1, 4), 2, Eviction::kLfu);
  for (int expert : {0, 0, 0, 1}) {
    cache.BeginLayer(0);
    Access(&cache, {0, expert});
  }
  EXPECT_EQ(cache.Victim(), (ExpertKey{0, 1}));
}

TEST(ExpertCacheTest, LfruForgivesNoLongAbsence) {
  ExpertCache cache(Geometry(0, 1, 4), 2, Eviction::kLfru);
  for (int expert : {0, 0, 1, 1, 1, 1}) {
    cache.BeginLayer(0);
    Access(&cache, {0, expert});
  }
  EXPECT_EQ(cache.Victim(), (ExpertKey{0, 0}));
}

TEST(ExpertCacheTest, LeastStaleGivesUpWhatItsLayerDidNotUse) {
  ExpertCache cache(Geometry(0, 2, 4), 3, Eviction::kLeastStale);
  for (ExpertKey key : {ExpertKey{0, 0}, {1, 0}, {0, 1}}) {
    cache.BeginLayer(key.layer);
    Access(&cache, key);
  }
  EXPECT_EQ(cache.Victim(), (ExpertKey{0, 0}));  // layer 0 ran again without it
}

TEST(ExpertCacheTest, PhaseAwareGivesUpTheOtherStackFirst) {
  ExpertCache cache(Geometry(1, 1, 4), 3, Eviction::kPhaseAware);
  for (ExpertKey key : {ExpertKey{1, 0}, {0, 0}, {1, 1}}) {
    cache.BeginLayer(key.layer);
    Access(&cache, key);
  }
  EXPECT_EQ(cache.Victim(), (ExpertKey{0, 0}));
}

TEST(ExpertCacheTest, PinnedAndLoadingAreNoVictims) {
  ExpertCache cache(Geometry(0, 1, 4), 2, Eviction::kLru);
  cache.BeginLayer(0);
  Access(&cache, {0, 0});
  cache.Load({0, 1});
  cache.Pin({0, 0});
  EXPECT_EQ(cache.Victim(), std::nullopt);
  cache.Unpin({0, 0});
  EXPECT_EQ(cache.Victim(), (ExpertKey{0, 0}));
}

TEST(ExpertCacheTest, EverySlotHasAtMostOneKey) {
  const MoeGeometry g = Geometry(1, 1, 6);
  ExpertCache cache(g, 5, Eviction::kLfru);
  for (ExpertKey key : RandomUses(g, 9, 500)) {
    cache.BeginLayer(key.layer);
    Access(&cache, key);
    int present = 0;
    for (int i = 0; i < g.num_keys(); ++i) {
      const ExpertKey k = ExpertKey::FromIndex(i, g);
      if (cache.slot(k) < 0) continue;
      ++present;
      ASSERT_EQ(cache.KeyIndexIn(cache.slot(k)), i);
    }
    ASSERT_EQ(present + cache.free_slots(), 5);
  }
}

TEST(ExpertCacheTest, UseRateIsTheFadingShareOfVisits) {
  ExpertCache cache(Geometry(0, 1, 4), 4, Eviction::kLru);
  // What a visit weighs of the next.
  constexpr double kFading = 1 - 1.0 / 256;
  std::vector<double> used(2, 0.0);
  double visits = 0;
  for (int i = 0; i < 3000; ++i) {
    const int expert = i % 4 == 0 ? 1 : 0;
    cache.BeginLayer(0);
    Access(&cache, {0, expert});
    visits = visits * kFading + 1;
    for (int e : {0, 1}) used[e] = used[e] * kFading + (e == expert);
    ASSERT_NEAR(cache.UseRate({0, 0}), used[0] / visits, 1e-9);
    ASSERT_NEAR(cache.UseRate({0, 1}), used[1] / visits, 1e-9);
  }
  EXPECT_EQ(cache.UseRate({0, 3}), 0);
  // A habit that has ended is forgotten, however long ago.
  for (int i = 0; i < 2000; ++i) {
    cache.BeginLayer(0);
    Access(&cache, {0, 2});
    used[0] *= kFading;
    visits = visits * kFading + 1;
  }
  EXPECT_NEAR(cache.UseRate({0, 0}), used[0] / visits, 1e-9);
  EXPECT_LT(cache.UseRate({0, 0}), 0.001);
}

TEST(ExpertCacheTest, AUseShareBeginsWithThePriorAndFollowsTheUses) {
  ExpertCache cache(Geometry(0, 1, 4), 4, Eviction::kLru);
  EXPECT_EQ(cache.UseShare({0, 1}), 0);
  cache.SetPrior({.1, .6, .3, 0});
  EXPECT_DOUBLE_EQ(cache.UseShare({0, 1}), .6);
  for (int i = 0; i < 2000; ++i) {
    cache.BeginLayer(0);
    Access(&cache, {0, 3});
  }
  EXPECT_LT(cache.UseShare({0, 1}), .03);
  EXPECT_GT(cache.UseShare({0, 3}), .9);
}

TEST(ExpertCacheTest, WhatIsTouchedLeavesAsIfItHadBeenUsed) {
  ExpertCache cache(Geometry(0, 1, 4), 3, Eviction::kLru);
  for (const ExpertKey key : {ExpertKey{0, 2}, {0, 0}, {0, 1}}) {
    cache.Load(key);
    cache.Arrive(key);
    cache.Touch(key);
  }
  EXPECT_EQ(cache.Victim(), (ExpertKey{0, 2}));
  EXPECT_EQ(cache.UseRate({0, 1}), 0);
}

TEST(ExpertCacheTest, UnknownEvictionNamesTheNearest) {
  try {
    ParseEviction("lrru");
    FAIL();
  } catch (const UsageError& e) {
    EXPECT_NE(std::string(e.what()).find("lfru"), std::string::npos) << e.what();
  }
}

}  // namespace
}  // namespace routecast
