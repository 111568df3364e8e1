#include "trainer/determinism.h"

#include <ATen/Context.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

#include "common/stop.h"

namespace routecast {
namespace {

TEST(Determinism, TheCostIsMeasuredBothWaysAndAlgorithmsStayPinned) {
  std::vector<bool> pinned;
  const std::string line = CostOfPinning(
      [&] { pinned.push_back(at::globalContext().deterministicAlgorithms()); });
  EXPECT_EQ(pinned,
            std::vector<bool>({false, true, false, true, false, true, false, true}));
  EXPECT_TRUE(at::globalContext().deterministicAlgorithms());
  EXPECT_THAT(line, testing::StartsWith("deterministic: a micro-batch takes "));
}

// In a process of its own: a stop is for good.
TEST(Determinism, AStopIsHeardWhileTheCostIsMeasured) {
  EXPECT_EXIT(
      {
        int passes = 0;
        const std::string line = CostOfPinning([&] {
          ++passes;
          RequestStop();
        });
        const bool pinned = at::globalContext().deterministicAlgorithms();
        std::_Exit(line.empty() && pinned ? passes : 100);
      },
      testing::ExitedWithCode(1), "");
}

TEST(Determinism, MemoryIsNotFilledForNobody) {
  PinAlgorithms(true);
  EXPECT_FALSE(at::globalContext().deterministicFillUninitializedMemory());
  PinAlgorithms(false);
  EXPECT_FALSE(at::globalContext().deterministicAlgorithms());
}

}  // namespace
}  // namespace routecast
