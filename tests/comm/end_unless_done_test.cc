// A call that never comes back ends the process, and no other call does.
#include "comm/end_unless_done.h"

#include <gtest/gtest.h>

#include <chrono>
#include <stdexcept>
#include <thread>

#include "common/errors.h"

namespace routecast {
namespace {

constexpr double kAnHour = 3600;

TEST(EndUnlessDone, WhatHangsEndsTheProcessWithItsError) {
  const std::string error = ErrorText("rank 1 of 2: it failed", "why", "what helps");
  EXPECT_EXIT(EndUnlessDone(0.05, error,
                            [] {
                              for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
                            }),
              testing::ExitedWithCode(kExitEnvironment),
              "end_unless_done_test: rank 1 of 2: it failed\n.*why\n.*what helps");
}

TEST(EndUnlessDone, WhatComesBackIsNotWaitedFor) {
  bool done = false;
  EndUnlessDone(kAnHour, "not said", [&] { done = true; });
  EXPECT_TRUE(done);
}

TEST(EndUnlessDone, WhatIsThrownGoesOn) {
  const auto fail = [] { throw std::runtime_error("its own"); };
  EXPECT_THROW(EndUnlessDone(kAnHour, "not said", fail), std::runtime_error);
}

}  // namespace
}  // namespace routecast
