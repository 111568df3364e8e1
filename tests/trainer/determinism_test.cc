#include "trainer/determinism.h"

#include <ATen/Context.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

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

TEST(Determinism, MemoryIsNotFilledForNobody) {
  PinAlgorithms(true);
  EXPECT_FALSE(at::globalContext().deterministicFillUninitializedMemory());
  PinAlgorithms(false);
  EXPECT_FALSE(at::globalContext().deterministicAlgorithms());
}

}  // namespace
}  // namespace routecast
