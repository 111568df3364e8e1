#include "evaluator/prefetch_planner.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "common/errors.h"
#include "gtest/gtest.h"
#include "tests/evaluator/planner_rig.h"

namespace routecast {
namespace {

// Both layers once, so that the timeline knows the order and 2 s of work a layer.
void Teach(Rig* rig) {
  for (int i = 0; i < 2; ++i) {
    rig->Layer(0, {0}, 2);
    rig->Layer(1, {0}, 2);
  }
  rig->Layer(0, {0}, 0);
}

// One expert a token: as it is published. Of several, auto alone looks to a layer's next
// turn.
TEST(PrefetchPlannerTest, AutoLooksToTheNextTurnWhereTokensTakeSeveralExperts) {
  const auto leads = [](const char* policy, MoeGeometry geometry) {
    return PolicyFor(policy, geometry).max_lead;
  };
  EXPECT_EQ(leads("auto", {0, 24, 32, 1, 8}), 4);
  EXPECT_EQ(leads("auto", {0, 24, 32, 4, 8}), 24);
  EXPECT_EQ(leads("auto", {0, 2, 32, 4, 8}), 4);
  EXPECT_EQ(leads("auto", {0, 90, 32, 4, 8}), 48);
  EXPECT_EQ(leads("top_k", {0, 24, 32, 4, 8}), 3);
}

TEST(PrefetchPlannerTest, DemandWaitsForItsTransferOnce) {
  Rig rig(3);
  EXPECT_DOUBLE_EQ(rig.Layer(0, {1}), 1);
  EXPECT_DOUBLE_EQ(rig.Layer(0, {1}), 0);
  EXPECT_EQ(rig.planner.ledger().hits, 1u);
  EXPECT_EQ(rig.planner.ledger().bytes_useful, 1000u);
}

TEST(PrefetchPlannerTest, PrefetchInTimeHidesTheTransfer) {
  Rig rig(4);
  Teach(&rig);
  rig.Predict(1, 1, {0, 0, .9f, 0});
  rig.link.AdvanceTo(rig.clock.Now() + 2);
  EXPECT_DOUBLE_EQ(rig.Layer(1, {2}), 0);
  EXPECT_EQ(rig.planner.ledger().speculations_used, 1u);
  EXPECT_EQ(rig.planner.ledger().bytes_wasted, 0u);
}

TEST(PrefetchPlannerTest, DemandJoinsTheTransferUnderWay) {
  Rig rig(4);
  Teach(&rig);
  const size_t before = rig.started.size();
  rig.Predict(1, 1, {0, 0, .9f, 0});
  rig.link.AdvanceTo(rig.clock.Now() + 0.5);
  EXPECT_DOUBLE_EQ(rig.Layer(1, {2}), 0.5);
  EXPECT_EQ(rig.started.size(), before + 1);
  EXPECT_EQ(rig.planner.ledger().bytes_late, 1000u);
}

TEST(PrefetchPlannerTest, AJoinedTransferIsPromotedOnce) {
  Rig rig(4);
  Teach(&rig);
  rig.Predict(1, 1, {0, 0, .9f, 0});
  rig.planner.BeginLayer(1, std::vector<int>{2});
  EXPECT_EQ(rig.planner.Poll().promote, std::vector<uint64_t>{rig.started.back().id});
  EXPECT_TRUE(rig.planner.Poll().promote.empty());
}

TEST(PrefetchPlannerTest, DemandOvertakesASpeculationUnderWay) {
  Rig rig(4, Eager(), /*can_cancel=*/false);
  Teach(&rig);
  rig.Predict(1, 1, {0, 0, .9f, 0});
  rig.link.AdvanceTo(rig.clock.Now() + 0.3);
  // The chunk under way ends at 0.5, then the demand has the link for itself.
  EXPECT_NEAR(rig.Layer(1, {3}), 0.2 + 1, 1e-9);
}

TEST(PrefetchPlannerTest, WhatIsNeededSoonerGoesBeforeWhatIsALittleLikelier) {
  Rig rig(4);
  Teach(&rig);
  rig.planner.Predict(1, 1, std::vector<float>{0, .5f, 0, 0});
  rig.planner.Predict(0, 2, std::vector<float>{0, .7f, 0, 0});
  rig.Drive();
  EXPECT_EQ(rig.started.back().key, (ExpertKey{1, 1}));
}

// Two may be under way; the other place is the demands'.
TEST(PrefetchPlannerTest, OneSpeculationIsUnderWayAtATime) {
  Rig rig(4);
  Teach(&rig);
  rig.planner.Predict(1, 1, std::vector<float>{0, .9f, .8f, 0});
  const size_t before = rig.started.size();
  rig.Drive();
  EXPECT_EQ(rig.started.size(), before + 1);
}

TEST(PrefetchPlannerTest, WrongSpeculationIsCancelledWhenItsLayerIsKnown) {
  Rig rig(4);
  Teach(&rig);
  rig.Predict(1, 1, {0, 0, .9f, 0});
  rig.link.AdvanceTo(rig.clock.Now() + 0.3);
  rig.Layer(1, {0}, 2);
  EXPECT_EQ(rig.cancelled, 1);
  EXPECT_EQ(rig.cache.state({1, 2}), ExpertCache::State::kAbsent);
  EXPECT_EQ(rig.planner.ledger().bytes_wasted, 500u);
}

TEST(PrefetchPlannerTest, StartsNothingThatCannotArriveInTime) {
  Rig rig(4, Eager(), false, /*late_allowance=*/0);
  for (int i = 0; i < 3; ++i) {  // 0.5 s a layer, 1 s a transfer
    rig.Layer(0, {0}, 0.5);
    rig.Layer(1, {0}, 0.5);
  }
  const size_t before = rig.started.size();
  rig.Predict(0, 1, {0, .9f, 0, 0});
  EXPECT_EQ(rig.started.size(), before);
  rig.Predict(0, 3, {0, .9f, 0, 0});
  EXPECT_EQ(rig.started.size(), before + 1);
}

// One pass: some work up to layer 0, then both layers with half a second each.
void Pass(Rig* rig, bool rested) {
  rig->planner.BeginPass(rested);
  rig->link.AdvanceTo(rig->clock.Now() + 1.5);
  rig->Layer(0, {0}, 0.5);
  rig->Layer(1, {0}, 0.5);
}

TEST(PrefetchPlannerTest, AfterARestThePassBeginSaysWhatIsInTime) {
  Rig rig(4, Eager(), false, /*late_allowance=*/0);
  for (int i = 0; i < 3; ++i) Pass(&rig, false);
  rig.link.AdvanceTo(rig.clock.Now() + 100);
  rig.planner.BeginPass(true);
  const size_t before = rig.started.size();
  rig.Predict(0, 1, {0, .9f, 0, 0});  // 1.5 s from here, by what passes took before
  EXPECT_EQ(rig.started.size(), before + 1);
}

TEST(PrefetchPlannerTest, ARestIsNotTakenForWork) {
  Rig rig(4, Eager(), false, /*late_allowance=*/0);
  for (int i = 0; i < 3; ++i) Pass(&rig, false);
  rig.link.AdvanceTo(rig.clock.Now() + 100);
  Pass(&rig, true);
  rig.link.AdvanceTo(rig.clock.Now() + 1.2);
  const size_t before = rig.started.size();
  rig.Predict(0, 1, {0, .9f, 0, 0});  // .3 s are left of the 2 since layer 1 began
  EXPECT_EQ(rig.started.size(), before);
}

TEST(PrefetchPlannerTest, WhileTheModelWaitsWhatFollowsIsNeededLater) {
  Rig rig(4, Eager(), false, /*late_allowance=*/0);
  for (int i = 0; i < 3; ++i) {  // 1.2 s a layer, 1 s a transfer
    rig.Layer(0, {0}, 1.2);
    rig.Layer(1, {0}, 1.2);
  }
  rig.planner.BeginLayer(0, std::vector<int>{1});
  rig.Drive();
  const size_t before = rig.started.size();
  rig.Predict(1, 1, {0, 0, .9f, 0});  // arrives at 2 s, needed at 1 s + 1.2 s
  EXPECT_EQ(rig.started.size(), before + 1);
}

TEST(PrefetchPlannerTest, SpeculationEvictsNothingNeededSooner) {
  Rig rig(2);
  Teach(&rig);  // holds (0,0) and (1,0), both used at every visit
  rig.planner.Predict(1, 1, std::vector<float>{.9f, .3f, 0, 0});
  rig.planner.Predict(0, 2, std::vector<float>{.9f, .3f, 0, 0});
  const size_t before = rig.started.size();
  rig.Drive();
  EXPECT_EQ(rig.started.size(), before);
}

TEST(PrefetchPlannerTest, SpeculationTakesTheSlotOfWhatIsNeededLater) {
  Rig rig(2);
  Teach(&rig);
  rig.planner.Predict(1, 1, std::vector<float>{0, .9f, 0, 0});
  rig.planner.Predict(0, 2, std::vector<float>{1, 0, 0, 0});
  rig.Drive();
  EXPECT_EQ(rig.cache.state({1, 1}), ExpertCache::State::kLoading);
  EXPECT_EQ(rig.cache.state({0, 0}), ExpertCache::State::kReady);
}

// Experts 0, 1 and 2 of layer 0 are used in turn, 0 last; layer 1's first is foretold, so
// that predictions say who leaves for it.
std::optional<ExpertKey> WhoLeaves(std::vector<float> later_shares,
                                   bool forgotten = false) {
  Rig rig(4);
  for (int expert : {2, 1, 0}) {
    rig.Layer(0, {expert}, 5);
    rig.Layer(1, {3}, 5);
  }
  rig.planner.BeginLayer(0, {{0}});
  rig.Drive();
  rig.planner.Release(*rig.planner.TakeReady());
  if (!later_shares.empty()) rig.planner.PredictLater(0, later_shares);
  if (forgotten) rig.planner.ForgetPredictions();
  rig.planner.Predict(1, 1, std::vector<float>{1, 0, 0, 0});
  const PlannerActions& actions = rig.planner.Poll();
  if (actions.evicted.size() != 1) return std::nullopt;
  return actions.evicted[0];
}

TEST(PrefetchPlannerTest, WhatIsSaidOfLaterUseSaysWhoLeaves) {
  const ExpertKey by_use = {0, 2}, said = {0, 1};
  EXPECT_EQ(WhoLeaves({}), by_use) << "the use rate's least, used first";
  EXPECT_EQ(WhoLeaves({.4f, .01f, .6f, 0}), said);
  EXPECT_EQ(WhoLeaves({.4f, .01f, .6f, 0}, /*forgotten=*/true), by_use);
}

TEST(PrefetchPlannerTest, OnDemandPolicyIgnoresPredictions) {
  Rig rig(4, ParsePolicy("on_demand"));
  Teach(&rig);
  const size_t before = rig.started.size();
  rig.Predict(1, 1, {0, 0, 1, 0});
  EXPECT_EQ(rig.started.size(), before);
}

TEST(PrefetchPlannerTest, MoreExpertsThanSlotsRunOneAfterTheOther) {
  Rig rig(2);
  EXPECT_NEAR(rig.Layer(0, {0, 1, 2, 3}), 4, 1e-9);
}

TEST(PrefetchPlannerTest, WithoutCacheNothingStays) {
  Rig rig(2, ParsePolicy("on_demand"), true, 0, {0, 2, 4, 1, 8}, Eviction::kNone);
  rig.Layer(0, {1});
  EXPECT_EQ(rig.cache.free_slots(), 2);
  EXPECT_DOUBLE_EQ(rig.Layer(0, {1}), 1);
}

TEST(PrefetchPlannerTest, LessRoomEvictsWhatIsWorthLeastAndComesBack) {
  Rig rig(3, Eager());
  rig.Layer(0, {0, 1, 2}, 1);
  rig.planner.SetCapacity(2);
  const PlannerActions less = rig.planner.Poll();
  ASSERT_EQ(less.evicted.size(), 1u);
  EXPECT_EQ(less.evicted[0].expert, 0) << "least recently used";
  ASSERT_EQ(less.retired.size(), 1u);
  EXPECT_TRUE(rig.cache.IsRetired(less.retired[0]));
  rig.Layer(1, {0}, 1);  // evicts, though a third slot exists
  EXPECT_EQ(rig.cache.held_slots(), 2);
  rig.planner.SetCapacity(3);
  EXPECT_EQ(rig.planner.Poll().restored, less.retired);
  rig.Layer(1, {1}, 1);
  EXPECT_EQ(rig.cache.held_slots(), 3);
}

TEST(PrefetchPlannerTest, ALeasedExpertIsNotEvictedForLackOfRoom) {
  Rig rig(3, Eager());
  rig.Layer(0, {0, 1}, 1);
  rig.planner.BeginLayer(1, std::vector<int>{0});
  rig.Drive();
  while (rig.link.NextEvent() >= 0) rig.link.AdvanceTo(rig.link.NextEvent());
  const auto leased = rig.planner.TakeReady();
  ASSERT_TRUE(leased);
  rig.planner.SetCapacity(2);
  rig.Drive();
  EXPECT_TRUE(rig.planner.within_capacity());
  EXPECT_EQ(rig.cache.state(*leased), ExpertCache::State::kReady);
  EXPECT_THROW(rig.planner.SetCapacity(1), std::logic_error);
  rig.planner.Release(*leased);
}

TEST(PrefetchPlannerTest, FailedDemandIsReported) {
  Rig rig(2);
  rig.planner.BeginLayer(0, std::vector<int>{3});
  rig.link.FailOn(1);
  rig.Drive();
  rig.link.AdvanceTo(1);
  EXPECT_EQ(rig.planner.failed(), (ExpertKey{0, 3}));
}

TEST(PrefetchPlannerTest, FailedSpeculationIsNotTriedAgain) {
  Rig rig(4);
  Teach(&rig);
  rig.link.FailOn(rig.started.back().id + 1);
  rig.Predict(1, 1, {0, 0, .9f, 0});
  const size_t after = rig.started.size();
  rig.link.AdvanceTo(rig.clock.Now() + 1.9);
  EXPECT_EQ(rig.started.size(), after);
  EXPECT_EQ(rig.planner.failed(), std::nullopt);
}

TEST(PrefetchPlannerTest, LinkEstimateFollowsTheMeasuredRate) {
  Rig rig(2);
  PlannerOptions options{1000, 1e9, 2, 0, true, ParsePolicy("on_demand")};
  PrefetchPlanner planner(options, &rig.cache, &rig.clock);
  EXPECT_LT(planner.TransferSeconds(), 1e-5);
  rig.link.SetDone(
      [&](uint64_t id, TransferOutcome o, uint64_t b) { planner.OnDone(id, o, b); });
  for (int i = 0; i < 30; ++i) {
    planner.BeginLayer(0, std::vector<int>{i % 4});
    for (const TransferOrder& order : planner.Poll().start) rig.link.Start(order);
    rig.link.AdvanceTo(rig.clock.Now() + 1);
    if (const auto key = planner.TakeReady()) planner.Release(*key);
  }
  EXPECT_NEAR(planner.TransferSeconds(), 1, 0.05);
}

TEST(PrefetchPlannerTest, ConfidentStartsNothingBelowSeventyPercent) {
  Rig rig(4, ParsePolicy("confident"));
  Teach(&rig);
  const size_t before = rig.started.size();
  rig.Predict(1, 1, {0, 0, .69f, 0});
  EXPECT_EQ(rig.started.size(), before);
  rig.Predict(1, 1, {0, 0, .71f, 0});
  EXPECT_EQ(rig.started.size(), before + 1);
}

TEST(PrefetchPlannerTest, UnknownPolicyNamesTheNearest) {
  EXPECT_THROW(ParsePolicy("topk"), UsageError);
  EXPECT_EQ(ParsePolicies({"top_k", "on_demand"}),
            (std::vector<std::string>{"top_k", "on_demand"}));
  EXPECT_EQ(ParsePolicies({"all"}).size(), 7u) << "all that speculate";
  EXPECT_THROW(ParsePolicies({"top_k", "all"}), UsageError);
  EXPECT_THROW(ParsePolicies({}), UsageError);
}

}  // namespace
}  // namespace routecast
