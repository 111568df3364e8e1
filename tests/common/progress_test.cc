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

}  // namespace
}  // namespace routecast
