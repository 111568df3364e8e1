#include "evaluator/speculation_ledger.h"

#include <algorithm>

#include "common/random.h"
#include "gtest/gtest.h"
#include "tests/evaluator/planner_rig.h"

namespace routecast {
namespace {

constexpr Stack kStack = Stack::kDecoder;

TEST(SpeculationLedgerTest, WithoutEvidenceThePolicysThresholdHolds) {
  const SpeculationLedger ledger(3, 0.25);
  EXPECT_DOUBLE_EQ(ledger.Threshold(kStack, 1), 0.25);
  EXPECT_DOUBLE_EQ(ledger.Threshold(Stack::kEncoder, 3), 0.25);
  EXPECT_EQ(ledger.Accounts(kStack).size(), 3u);
}

TEST(SpeculationLedgerTest, ProbabilitiesThatComeTrueMoveNothing) {
  SpeculationLedger ledger(1, 0.25);
  for (uint64_t i = 0; i < 500; ++i) ledger.Judge(kStack, 1, 0.5, i % 2 == 0);
  EXPECT_NEAR(ledger.Threshold(kStack, 1), 0.25, 0.01);
}

TEST(SpeculationLedgerTest, WhatIsSaidTooHighNeedsMoreAndWhatIsSaidTooLowLess) {
  SpeculationLedger ledger(2, 0.25);
  for (uint64_t i = 0; i < 500; ++i) {
    ledger.Judge(kStack, 1, 0.8, i % 2 == 0);  // comes half of the time
    ledger.Judge(kStack, 2, 0.3, i % 2 == 0);
  }
  EXPECT_NEAR(ledger.Threshold(kStack, 1), 0.25 * 0.8 / 0.5, 0.03);
  EXPECT_NEAR(ledger.Threshold(kStack, 2), 0.25 * 0.3 / 0.5, 0.02);
  EXPECT_DOUBLE_EQ(ledger.Threshold(Stack::kEncoder, 1), 0.25);
}

TEST(SpeculationLedgerTest, TheThresholdKeepsItsLowerBound) {
  SpeculationLedger ledger(1, 0.4);
  for (int i = 0; i < 500; ++i) ledger.Judge(kStack, 1, 0.2, true);
  EXPECT_DOUBLE_EQ(ledger.Threshold(kStack, 1), 0.2);
}

TEST(SpeculationLedgerTest, WhatIsAlwaysWrongIsShutAndOpensWhenItGetsRight) {
  SpeculationLedger ledger(1, 0.25);
  for (int i = 0; i < 100; ++i) ledger.Judge(kStack, 1, 0.9, false);
  EXPECT_FALSE(ledger.Accounts(kStack)[0].open());
  int needed = 0;
  for (; !ledger.Accounts(kStack)[0].open() && needed < 100; ++needed)
    ledger.Judge(kStack, 1, 0.9, true);
  EXPECT_GT(needed, 1);
  EXPECT_LT(needed, 50);
}

TEST(SpeculationLedgerTest, LittleSavedAndMuchHarmedAskForMore) {
  SpeculationLedger late(1, 0.25), harmful(1, 0.25), useful(1, 0.25);
  for (int i = 0; i < 200; ++i) {
    late.Used(kStack, 1, 0.1);
    useful.Used(kStack, 1, 1);
    harmful.Unused(kStack, 1, 1);
    harmful.Harmed(kStack, 1, 1);
  }
  EXPECT_DOUBLE_EQ(useful.Threshold(kStack, 1), 0.25);
  EXPECT_GT(late.Threshold(kStack, 1), 0.45);
  EXPECT_GT(harmful.Threshold(kStack, 1), 0.45);
  EXPECT_DOUBLE_EQ(useful.Accounts(kStack)[0].saved, 200);
  EXPECT_NEAR(harmful.Accounts(kStack)[0].cost, 200 * (1 + 1 / 3.), 1e-9);
}

TEST(SpeculationLedgerTest, OnAnIdleLinkAWrongTransferCostsLess) {
  SpeculationLedger ledger(1, 0.25);
  ledger.SetLinkUse(kStack, 0);
  const double cost = 0.35 / 3;  // of a wrong transfer; a right one saves 1
  EXPECT_DOUBLE_EQ(ledger.Threshold(kStack, 1), cost / (1 + cost));
  EXPECT_DOUBLE_EQ(ledger.Threshold(Stack::kEncoder, 1), 0.25);
  for (int i = 0; i < 200; ++i) ledger.Harmed(kStack, 1, 1);
  EXPECT_GT(ledger.Threshold(kStack, 1), 0.5) << "what stands in the way costs its time";
  ledger.SetLinkUse(kStack, 0.8);
  SpeculationLedger busy(1, 0.25);
  for (int i = 0; i < 200; ++i) busy.Harmed(kStack, 1, 1);
  EXPECT_DOUBLE_EQ(ledger.Threshold(kStack, 1), busy.Threshold(kStack, 1));
}

TEST(SpeculationLedgerTest, APredictorThatIsAlwaysWrongIsShutOnAnIdleLinkToo) {
  SpeculationLedger ledger(1, 0.25);
  ledger.SetLinkUse(kStack, 0);
  for (int i = 0; i < 200; ++i) {
    ledger.Judge(kStack, 1, 0.9, false);
    ledger.Unused(kStack, 1, 1);
  }
  EXPECT_GT(ledger.Threshold(kStack, 1), 0.9);
}

// A planner with a predictor that is right one visit ahead, and three visits ahead only
// where `right` says so.
class TwoLeads {
 public:
  explicit TwoLeads(SpeculationPolicy policy)
      : rig(7, std::move(policy), true, 0.95, {0, 3, 16, 1, 8}) {}
  // Speculations that started for what was said three visits ahead.
  size_t Run(int visits, bool right) {
    size_t far = 0;
    for (const uint64_t end = visit_ + static_cast<uint64_t>(visits); visit_ < end;
         ++visit_) {
      const auto layer = static_cast<int>(visit_ % 3);
      rig.Layer(layer, {ExpertAt(visit_)}, 0);
      const size_t before = rig.started.size();
      Say(1, ExpertAt(visit_ + 1));
      Say(3, right ? ExpertAt(visit_ + 3) : (ExpertAt(visit_ + 3) + 5) % 16);
      rig.link.AdvanceTo(rig.clock.Now() + 2.5);
      // Three visits ahead the same layer comes again.
      for (size_t i = before; i < rig.started.size(); ++i)
        far += !rig.started[i].demand && rig.started[i].key.layer == layer;
    }
    return far;
  }
  Rig rig;

 private:
  static int ExpertAt(uint64_t visit) {
    return static_cast<int>(ToRange(Mix(visit, 9), 16));
  }
  void Say(int lead, int expert) {
    std::vector<float> p(16, 0.01f);
    p[static_cast<size_t>(expert)] = 0.85f;
    rig.Predict(static_cast<int>((visit_ + static_cast<uint64_t>(lead)) % 3), lead, p);
  }
  uint64_t visit_ = 0;
};

SpeculationPolicy Adaptive() {
  return {"adaptive", true, 3, 2, 0.25, false, false, /*adapt_threshold=*/true};
}

TEST(SpeculationLedgerTest, AWrongLeadIsShutAndARightOneStaysOpen) {
  TwoLeads life(Adaptive());
  EXPECT_GT(life.Run(40, false), 0u);
  life.Run(60, false);
  const auto accounts = life.rig.planner.speculation().Accounts(kStack);
  EXPECT_TRUE(accounts[0].open());
  EXPECT_LT(accounts[0].threshold, 0.5);
  EXPECT_GT(accounts[0].saved, 10);
  EXPECT_FALSE(accounts[2].open());
  EXPECT_GT(accounts[2].cost, 0);
  const uint64_t wasted = life.rig.planner.ledger().bytes_wasted;
  EXPECT_EQ(life.Run(50, false), 0u) << "what is shut fetches nothing";
  EXPECT_LE(life.rig.planner.ledger().bytes_wasted, wasted + 3000);
}

TEST(SpeculationLedgerTest, AShutLeadOpensWhenItGetsRight) {
  TwoLeads life(Adaptive());
  life.Run(100, false);
  ASSERT_FALSE(life.rig.planner.speculation().Accounts(kStack)[2].open());
  life.Run(60, true);
  EXPECT_TRUE(life.rig.planner.speculation().Accounts(kStack)[2].open());
  EXPECT_GT(life.Run(40, true), 0u);
}

// The same predictor under a policy of fixed settings: fetched to the end.
TEST(SpeculationLedgerTest, FixedPoliciesKeepTheirThreshold) {
  SpeculationPolicy fixed = Adaptive();
  fixed.adapt_threshold = false;
  TwoLeads life(fixed);
  life.Run(100, false);
  EXPECT_GT(life.Run(50, false), 0u);
  for (const char* name : {"multi_look", "top_k", "intelligent", "confident"})
    EXPECT_FALSE(ParsePolicy(name).adapt_threshold) << name;
  EXPECT_TRUE(ParsePolicy("auto").adapt_threshold);
}

// Every visit says an expert at .15, of which a quarter of the visits (`misses`) demand
// one that is not there: the link is idle, or busy, for the rest of the time.
size_t SpeculationsAtAFifteenth(double compute) {
  Rig rig(8, Adaptive(), true, 0.95, {0, 2, 32, 1, 8});
  for (uint64_t visit = 0; visit < 400; ++visit) {
    const int layer = static_cast<int>(visit % 2);
    rig.Layer(layer, {static_cast<int>(ToRange(Mix(visit, 3), 32))}, 0);
    if (visit >= 200) {
      std::vector<float> p(32, 0.001f);
      p[static_cast<size_t>(ToRange(Mix(visit, 4), 32))] = 0.15f;
      rig.Predict(1 - layer, 1, p);
    }
    rig.link.AdvanceTo(rig.clock.Now() + compute);
  }
  size_t speculations = 0;
  for (const TransferOrder& order : rig.started) speculations += !order.demand;
  return speculations;
}

TEST(SpeculationLedgerTest, WhatIsUnlikelyIsFetchedOnAnIdleLinkAlone) {
  EXPECT_EQ(SpeculationsAtAFifteenth(0.1), 0u);  // a transfer takes a second
  EXPECT_GT(SpeculationsAtAFifteenth(12), 10u);
}

}  // namespace
}  // namespace routecast
