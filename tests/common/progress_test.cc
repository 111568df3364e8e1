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

TEST(ProgressTest, SlowRatesAreByTheLongerTime) {
  EXPECT_EQ(RateText(12), "12.0/s");
  EXPECT_EQ(RateText(.5), "0.5/s");
  EXPECT_EQ(RateText(1. / 15), "4.0/min");
  EXPECT_EQ(RateText(1. / 1800), "2.0/h");
  EXPECT_EQ(RateText(0), "0.0/s");
}

}  // namespace
}  // namespace routecast
