// A phase-aware cache: the encoder's experts leave behind their layer, the decoder's are
// warmed while the encoder leaves the link idle.
#include <algorithm>

#include "gtest/gtest.h"
#include "tests/evaluator/planner_rig.h"

namespace routecast {
namespace {

constexpr MoeGeometry kGeometry{2, 2, 4, 1, 8};

// An encoder pass, then decoder passes, `work` seconds after each layer.
void Sequence(Rig* rig, int steps, double work) {
  for (int layer : {0, 1}) rig->Layer(layer, {0, 1}, work);
  for (int i = 0; i < steps; ++i) {
    rig->Layer(2, {3}, work);
    rig->Layer(3, {i % 4 == 3 ? 1 : 2}, work);
  }
}

Rig MakeRig(int slots, SpeculationPolicy policy = Eager(),
            Eviction eviction = Eviction::kPhaseAware) {
  return Rig(slots, std::move(policy), true, 0, kGeometry, eviction);
}

bool Held(const Rig& rig, ExpertKey key) {
  return rig.cache.state(key) == ExpertCache::State::kReady;
}

TEST(PhaseAwareTest, TheEncoderLeavesBehindItsLayer) {
  ExpertCache cache(kGeometry, 4, Eviction::kPhaseAware);
  const auto use = [&](ExpertKey key) {
    cache.BeginLayer(key.layer);
    if (cache.state(key) == ExpertCache::State::kAbsent) {
      cache.Load(key);
      cache.Arrive(key);
    }
    cache.Use(key);
  };
  use({2, 0});  // the decoder's, least recently used
  use({0, 0});
  EXPECT_TRUE(cache.Passed(0));
  EXPECT_FALSE(cache.Passed(1));
  use({1, 0});
  EXPECT_EQ(cache.Victim(), (ExpertKey{0, 0}));
  // While layer 0 runs, layer 1's will be used in this pass; the decoder's in the next.
  cache.BeginLayer(0);
  const ExpertKey passed[] = {{0, 0}};
  EXPECT_EQ(cache.Victim(passed), (ExpertKey{2, 0}));
  cache.BeginLayer(2);
  EXPECT_TRUE(cache.Passed(1));
  EXPECT_FALSE(cache.Passed(2));
}

TEST(PhaseAwareTest, NoOtherRuleKnowsWhatIsPassed) {
  ExpertCache cache(kGeometry, 4, Eviction::kLru);
  cache.BeginLayer(1);
  EXPECT_FALSE(cache.Passed(0));
}

TEST(PhaseAwareTest, WhatTheEncoderHasPassedLeavesWhateverIsForetold) {
  Rig rig = MakeRig(3);
  rig.Layer(2, {0}, 2);
  rig.Layer(0, {0}, 2);
  rig.Layer(1, {0}, 2);
  rig.planner.Predict(2, 1, std::vector<float>{.05f, 0, 0, 0});
  rig.planner.Predict(0, 3, std::vector<float>{1, 0, 0, 0});
  rig.planner.BeginLayer(2, std::vector<int>{1});
  rig.Drive();
  EXPECT_TRUE(Held(rig, {2, 0}));
  EXPECT_FALSE(Held(rig, {0, 0}));
}

TEST(PhaseAwareTest, AnIdleLinkWarmsTheDecodersMostUsed) {
  Rig rig = MakeRig(6);
  Sequence(&rig, 8, 3);
  rig.Layer(2, {0}, 3);  // pushes nothing out: six slots
  rig.Layer(3, {0}, 3);
  Sequence(&rig, 0, 0);  // an encoder in a hurry: its experts come
  for (const ExpertKey key : {ExpertKey{2, 3}, {3, 2}}) {
    if (Held(rig, key)) rig.cache.Drop(key);
  }
  const size_t before = rig.started.size();
  rig.Layer(0, {0, 1}, 3);
  rig.Layer(1, {0, 1}, 3);
  const auto first =
      std::find_if(rig.started.begin() + static_cast<long>(before), rig.started.end(),
                   [](const TransferOrder& order) { return !order.demand; });
  ASSERT_NE(first, rig.started.end());
  EXPECT_EQ(first->key, (ExpertKey{2, 3}));  // used at 8 of 9 visits
  EXPECT_TRUE(Held(rig, {3, 2}));
  EXPECT_EQ(rig.Layer(2, {3}, 3), 0);
  EXPECT_EQ(rig.planner.ledger().speculations_in_time, 1u);
}

TEST(PhaseAwareTest, WhatACountSaysIsWarmedBeforeAnyUse) {
  Rig rig = MakeRig(6);
  std::vector<double> shares(16, 0.0);
  shares[3 * 4 + 1] = .7;  // layer 3, expert 1
  rig.cache.SetPrior(shares);
  rig.Layer(0, {0}, 3);
  rig.Layer(1, {0}, 3);
  EXPECT_TRUE(Held(rig, {3, 1}));
  EXPECT_EQ(rig.planner.ledger().speculations, 1u);
}

TEST(PhaseAwareTest, WarmingTakesTheSlotsOfWhatHasPassedAlone) {
  Rig rig = MakeRig(3);
  std::vector<double> shares(16, 0.0);
  shares[3 * 4 + 1] = .7;  // layer 3, expert 1
  rig.cache.SetPrior(shares);
  rig.Layer(2, {0}, 2);
  rig.Layer(3, {0}, 2);
  rig.planner.BeginLayer(0, std::vector<int>{0});
  rig.Drive();
  rig.link.AdvanceTo(rig.clock.Now() + 1);
  const auto leased = rig.planner.TakeReady();
  ASSERT_TRUE(leased);
  rig.Drive();  // every slot is held, and the link is idle
  EXPECT_TRUE(Held(rig, {2, 0}) && Held(rig, {3, 0}));
  EXPECT_EQ(rig.planner.ledger().speculations, 0u);
  rig.planner.Release(*leased);
  rig.Drive();
  EXPECT_EQ(rig.started.back().key, (ExpertKey{3, 1}));
  EXPECT_TRUE(Held(rig, {2, 0}) && Held(rig, {3, 0}));
}

// The same life under another eviction or policy: nothing is brought unasked.
TEST(PhaseAwareTest, NobodyElseWarms) {
  for (const bool on_demand : {false, true}) {
    Rig rig = on_demand ? MakeRig(6, ParsePolicy("on_demand"))
                        : MakeRig(6, Eager(), Eviction::kLru);
    for (int i = 0; i < 3; ++i) Sequence(&rig, 8, 3);
    EXPECT_EQ(rig.planner.ledger().speculations, 0u) << on_demand;
  }
  Rig rig = MakeRig(6);
  rig.planner.SetWarming(false);
  for (int i = 0; i < 3; ++i) Sequence(&rig, 8, 3);
  EXPECT_EQ(rig.planner.ledger().speculations, 0u);
  rig.planner.SetWarming(true);
  Sequence(&rig, 8, 3);
  EXPECT_GT(rig.planner.ledger().speculations, 0u);
}

TEST(PhaseAwareTest, WarmingTakesNoSlotThatThePassStillNeeds) {
  Rig rig = MakeRig(4);
  Sequence(&rig, 8, 3);
  // The next encoder's experts are all that is held, and layer 0's turn has not come.
  rig.Layer(2, {3}, 0);
  rig.planner.BeginLayer(0, std::vector<int>{0, 1});
  rig.Drive();
  while (!rig.planner.AllServed()) {
    if (const auto key = rig.planner.TakeReady()) {
      EXPECT_NE(rig.cache.state(*key), ExpertCache::State::kAbsent);
      rig.planner.Release(*key);
    } else {
      rig.link.AdvanceTo(rig.link.NextEvent());
    }
  }
  SUCCEED();
}

TEST(PhaseAwareTest, WhatCannotArriveBeforeTheDecoderIsNotWarmed) {
  Rig rig = MakeRig(8);
  Sequence(&rig, 8, 0.4);  // .8 s from the encoder's begin to the decoder's
  rig.planner.SetWarming(false);
  Sequence(&rig, 1, 0.4);
  rig.planner.SetWarming(true);
  for (const ExpertKey key : {ExpertKey{2, 3}, {3, 2}}) {
    if (Held(rig, key)) rig.cache.Drop(key);
  }
  const size_t before = rig.started.size();
  rig.Layer(0, {0, 1}, 0.4);
  rig.Layer(1, {0, 1}, 0.4);
  EXPECT_EQ(rig.started.size(), before);
}

TEST(PhaseAwareTest, WhatIsForetoldOfTheEncoderGoesBeforeWarming) {
  Rig rig = MakeRig(8, {"eager", true, 1, 8, 0.01, false, false});
  Sequence(&rig, 8, 3);
  for (const ExpertKey key : {ExpertKey{2, 3}, {3, 2}}) {
    if (Held(rig, key)) rig.cache.Drop(key);
  }
  rig.Layer(0, {0, 1}, 0);
  ASSERT_EQ(rig.planner.in_flight(), 1);  // warming
  const uint64_t warming = rig.started.back().id;
  rig.link.AdvanceTo(rig.clock.Now() + 0.1);
  rig.Predict(1, 1, {0, 0, 0, .9f});
  EXPECT_EQ(rig.cancelled, 1);
  rig.link.AdvanceTo(rig.clock.Now() + 0.5);
  EXPECT_GT(rig.started.back().id, warming);
  EXPECT_NE(rig.cache.state({1, 3}), ExpertCache::State::kAbsent);
}

TEST(PhaseAwareTest, AFailedWarmingIsNotTriedAgain) {
  Rig rig = MakeRig(8);
  Sequence(&rig, 8, 3);
  if (Held(rig, {2, 3})) rig.cache.Drop({2, 3});
  rig.link.FailOn(rig.started.back().id + 1);
  const size_t before = rig.started.size();
  rig.Layer(0, {0, 1}, 3);
  rig.Layer(1, {0, 1}, 3);
  EXPECT_EQ(
      std::count_if(rig.started.begin() + static_cast<long>(before), rig.started.end(),
                    [](const TransferOrder& o) {
                      return o.key == ExpertKey{2, 3};
                    }),
      1);
  EXPECT_EQ(rig.Layer(2, {3}, 3), 1);  // a demand brings it
}

}  // namespace
}  // namespace routecast
