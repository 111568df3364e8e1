// Ranks that reduce by NCCL have a device each, whatever it is called where they run.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "comm/nccl_communicator.h"
#include "common/errors.h"

namespace routecast {
namespace {

TEST(OwnDevices, OneARankIsAllThatIsAsked) {
  const std::vector<std::string> devices = {"a GPU-01", "a GPU-02", "b GPU-01"};
  EXPECT_NO_THROW(RequireOwnDevices(devices));
}

TEST(OwnDevices, ASharedOneIsNamedWithItsRanks) {
  const std::vector<std::string> devices = {"a GPU-01", "a GPU-02", "a GPU-01"};
  try {
    RequireOwnDevices(devices);
    FAIL() << "nothing was thrown";
  } catch (const UsageError& e) {
    EXPECT_THAT(e.what(), testing::HasSubstr("ranks 0 and 2 have a GPU-01"));
    EXPECT_THAT(e.what(), testing::HasSubstr("--device=cuda,"));
  }
}

TEST(OwnDevices, GroupsMayShareOneButNotARankWithItsNeighbours) {
  const std::vector<std::string> apart = {"a GPU-01", "a GPU-02", "a GPU-01", "a GPU-02"};
  EXPECT_NO_THROW(RequireOwnDevices(apart, 2));
  const std::vector<std::string> shared = {"a GPU-01", "a GPU-02", "a GPU-03",
                                           "a GPU-03"};
  try {
    RequireOwnDevices(shared, 2);
    FAIL() << "nothing was thrown";
  } catch (const UsageError& e) {
    EXPECT_THAT(e.what(), testing::HasSubstr("ranks 2 and 3 have a GPU-03"));
  }
}

}  // namespace
}  // namespace routecast
