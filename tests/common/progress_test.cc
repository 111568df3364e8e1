#include "common/progress.h"

#include <gtest/gtest.h>

#include <chrono>
#include <thread>

namespace routecast {
namespace {

TEST(ProgressTest, WorkBeforeAResumeIsNotInTheRate) {
  Progress progress("test", "steps", 2'000'000, /*quiet=*/true);
  progress.Update(1'000'000);
  std::this_thread::sleep_for(std::chrono::milliseconds(10));
  EXPECT_LE(progress.Rate(1'000'010), 1000);  // ten in 10 ms or more
}

TEST(ProgressTest, WorkOfThisRunIs) {
  Progress progress("test", "steps", 2'000'000, /*quiet=*/true);
  progress.Update(0);
  EXPECT_GT(progress.Rate(1'000'000), 0);
}

TEST(ProgressTest, TimeLeftIsOfTheWorkWhereUnitsAreNotEqual) {
  Progress progress("test", "chunks", 5, /*quiet=*/true);
  EXPECT_FALSE(progress.SecondsLeft());
  progress.Update(0, "", 0);
  EXPECT_FALSE(progress.SecondsLeft());
  std::this_thread::sleep_for(std::chrono::milliseconds(10));
  progress.Update(2, "", .9);  // by units three fifths would be left
  EXPECT_LT(*progress.SecondsLeft(), .2 * progress.seconds());
}

TEST(ProgressTest, TimeLeftIsOfUnitsElse) {
  Progress progress("test", "steps", 4, /*quiet=*/true);
  progress.Update(0);
  std::this_thread::sleep_for(std::chrono::milliseconds(10));
  progress.Update(1);
  EXPECT_GT(*progress.SecondsLeft(), 2 * .01);
}

// Steps under a clock that moves only when it is told to.
class ProgressClockTest : public testing::Test {
 protected:
  void Steps(uint64_t steps, double seconds) {
    for (uint64_t i = 0; i < steps; ++i) {
      Pass(seconds);
      progress_.Update(++done_);
    }
  }
  void Pass(double seconds) {
    now_ += std::chrono::duration_cast<std::chrono::steady_clock::duration>(
        std::chrono::duration<double>(seconds));
  }

  uint64_t done_ = 0;
  Progress::Time now_;
  Progress progress_{"test", "steps", 1000, /*quiet=*/true, [this] { return now_; }};
};

TEST_F(ProgressClockTest, APauseIsForgottenAfterHalfAMinute) {
  progress_.Update(0);
  Steps(100, 1);
  Pass(3600);
  Steps(32, 1);
  EXPECT_NEAR(*progress_.SecondsLeft(), 868, 10);
  EXPECT_NEAR(progress_.RecentRate(), 1, .02);
}

TEST_F(ProgressClockTest, TimeLeftFollowsASlowerPhase) {
  progress_.Update(0);
  Steps(500, .01);
  Steps(100, 1);
  EXPECT_NEAR(*progress_.SecondsLeft(), 400, 5);
}

TEST_F(ProgressClockTest, StepsOfMinutesAreJudgedByTheNewestEight) {
  progress_.Update(0);
  Steps(4, 60);
  Steps(8, 300);
  EXPECT_NEAR(*progress_.SecondsLeft(), 988 * 300, 1);
}

TEST_F(ProgressClockTest, UpdatesWithinAStepKeepTheRateOfTheStepsBefore) {
  progress_.Update(0);
  Steps(10, 1);
  for (int i = 0; i < 100; ++i) {
    Pass(.5);
    progress_.Update(done_);
  }
  EXPECT_NEAR(*progress_.SecondsLeft(), 990 * 6, 1);  // ten steps in a minute so far
}

TEST_F(ProgressClockTest, AResumedRunIsJudgedByItsOwnSteps) {
  done_ = 900;
  progress_.Update(900);
  Steps(10, 2);
  EXPECT_NEAR(*progress_.SecondsLeft(), 180, 1);
}

TEST(ProgressTest, SlowRatesAreByTheLongerTime) {
  EXPECT_EQ(RateText(12), "12.0/s");
  EXPECT_EQ(RateText(.5), "0.5/s");
  EXPECT_EQ(RateText(1. / 15), "4.0/min");
  EXPECT_EQ(RateText(1. / 1800), "2.0/h");
  EXPECT_EQ(RateText(0), "0.0/s");
}

}  // namespace
}  // namespace routecast
