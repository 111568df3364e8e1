#include "common/stop.h"

#include <gtest/gtest.h>

#include <csignal>

namespace routecast {
namespace {

TEST(Stop, SignalsSetTheFlagAndASecondOneIsHarmless) {
  InstallStopHandlers();
  EXPECT_FALSE(StopRequested());
  std::raise(SIGUSR1);
  EXPECT_TRUE(StopRequested());
  std::raise(SIGTERM);
  std::raise(SIGINT);
  EXPECT_TRUE(StopRequested());
}

}  // namespace
}  // namespace routecast
