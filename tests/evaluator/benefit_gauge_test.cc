#include "evaluator/benefit_gauge.h"

#include <gtest/gtest.h>

namespace routecast {
namespace {

TEST(BenefitGaugeTest, SwitchesOffWhatDoesNotHelp) {
  BenefitGauge gauge;
  while (gauge.in_trial()) gauge.Record(gauge.Speculate() ? 1.1 : 1.0);
  EXPECT_FALSE(gauge.helps());
  EXPECT_FALSE(gauge.Speculate());
}

TEST(BenefitGaugeTest, KeepsWhatHelpsThroughADriftingMachine) {
  BenefitGauge gauge;
  for (double drift = 1; gauge.in_trial(); drift *= 1.01) {
    gauge.Record(drift * (gauge.Speculate() ? 0.9 : 1.0));
  }
  EXPECT_TRUE(gauge.Speculate());
}

// Each mode first, then each last: a rise is not taken for what speculation saves.
TEST(BenefitGaugeTest, ARisingCostIsNoGain) {
  BenefitGauge gauge;
  for (double drift = 1; gauge.in_trial(); drift *= 1.01)
    gauge.Record(drift * (gauge.Speculate() ? 0.98 : 1.0));
  EXPECT_FALSE(gauge.helps());
}

TEST(BenefitGaugeTest, ASmallGainIsNotWorthTheBandwidth) {
  BenefitGauge gauge;
  while (gauge.in_trial()) gauge.Record(gauge.Speculate() ? 0.97 : 1.0);
  EXPECT_FALSE(gauge.helps());
}

// It still pays for what the other mode left in the cache.
TEST(BenefitGaugeTest, TheFirstStepOfABlockDoesNotCount) {
  BenefitGauge gauge;
  for (int step = 0; gauge.in_trial(); ++step)
    gauge.Record(gauge.Speculate() ? (step % 4 == 0 ? 5 : 0.8) : 1.0);
  EXPECT_TRUE(gauge.helps());
}

// Every 13th step begins a sequence and waits long in either mode: one trial of 48 steps
// may hold twice as many of them in one mode as in the other.
TEST(BenefitGaugeTest, AFewLongWaitsDoNotDecide) {
  for (int first = 0; first < 13; ++first) {
    BenefitGauge gauge;
    for (int step = first; gauge.in_trial(); ++step) {
      gauge.Record((gauge.Speculate() ? 0.7 : 1.0) + (step % 13 == 0 ? 12 : 0));
    }
    EXPECT_TRUE(gauge.helps()) << first;
  }
}

// Asking takes what waiting takes: nothing can be won, and a pass a sequence would take
// long to end a trial.
TEST(BenefitGaugeTest, AskingThatCostsMoreThanWaitingEndsTheTrialAtOnce) {
  BenefitGauge gauge;
  int steps = 0;
  for (; gauge.in_trial(); ++steps) {
    const bool on = gauge.Speculate();
    gauge.Record(on ? 1.2 : 1.0, true, on ? 1.1 : 0);
  }
  EXPECT_EQ(steps, 8);
  EXPECT_FALSE(gauge.helps());
}

// Most steps find what they need; a few wait long, and three steps may hold none of them.
TEST(BenefitGaugeTest, AskingIsHeldAgainstWaitingBeyondTheNoise) {
  BenefitGauge gauge;
  int steps = 0;
  for (; gauge.in_trial(); ++steps) {
    const bool on = gauge.Speculate();
    gauge.Record(on ? 0.3 : (steps % 4 == 1 ? 1.2 : 0.0), true, on ? 0.45 : 0);
  }
  EXPECT_GT(steps, 8);
}

TEST(BenefitGaugeTest, AskingThatCostsLessIsTriedToTheEnd) {
  BenefitGauge gauge;
  int steps = 0;
  for (; gauge.in_trial(); ++steps) {
    const bool on = gauge.Speculate();
    gauge.Record(on ? 0.9 : 1.0, true, on ? 0.85 : 0);
  }
  EXPECT_EQ(steps, 48);
  EXPECT_TRUE(gauge.helps());
}

TEST(BenefitGaugeTest, TriesAgainAfterASpell) {
  BenefitGauge gauge({4, 4, 10, 40});
  while (gauge.in_trial()) gauge.Record(gauge.Speculate() ? 2 : 1);
  for (int i = 0; i < 10; ++i) gauge.Record(1);
  ASSERT_TRUE(gauge.in_trial());
  while (gauge.in_trial()) gauge.Record(gauge.Speculate() ? 1 : 2);
  EXPECT_TRUE(gauge.helps());
}

TEST(BenefitGaugeTest, SpellsGrowUpToTheLongest) {
  BenefitGauge gauge({4, 4, 10, 30});
  for (const int expected : {10, 20, 30, 30}) {
    while (gauge.in_trial()) gauge.Record(gauge.Speculate() ? 2 : 1);
    int spell = 0;
    for (; !gauge.in_trial(); ++spell) gauge.Record(1);
    EXPECT_EQ(spell, expected);
  }
}

TEST(BenefitGaugeTest, ATrialThatIsDueWaitsForAStepThatMayBeginIt) {
  BenefitGauge gauge({4, 4, 10, 40});
  while (gauge.in_trial()) gauge.Record(gauge.Speculate() ? 2 : 1);
  EXPECT_FALSE(gauge.needs_predictor());
  for (int i = 0; i < 15; ++i) gauge.Record(1, false);
  EXPECT_FALSE(gauge.in_trial());
  EXPECT_TRUE(gauge.needs_predictor());
  gauge.Record(1, true);
  EXPECT_TRUE(gauge.in_trial());
}

}  // namespace
}  // namespace routecast
