#include "collector/rank_watch.h"

#include <gtest/gtest.h>

#include "collector/life_signs.h"
#include "tests/storage/temp_folder.h"

namespace routecast {
namespace {

constexpr double kLimit = 0.3;  // seconds

RankInfo RankOfTwo(int rank) { return {.rank = rank, .world = 2}; }

class RankWatchTest : public testing::Test {
 protected:
  // Rank 0's watch of rank 1, which calls this.
  RankWatch Watch() {
    return {folder_.path(), "t", RankOfTwo(0), kLimit, [this](const std::string& error) {
              const std::lock_guard lock(mutex_);
              error_ = error;
              told_.notify_all();
            }};
  }
  // What was told within some limits; empty: nothing.
  std::string Told() {
    std::unique_lock lock(mutex_);
    told_.wait_for(lock, std::chrono::duration<double>(4 * kLimit),
                   [this] { return !error_.empty(); });
    return error_;
  }
  // Until rank 0 has seen rank 1: it looks ten times within its limit.
  static void LetItLook() {
    for (int i = 0; i < 30; ++i) {
      ShowLife();
      std::this_thread::sleep_for(std::chrono::duration<double>(kLimit / 15));
    }
  }
  TempFolder folder_;
  std::mutex mutex_;
  std::condition_variable told_;
  std::string error_;
};

TEST_F(RankWatchTest, ARankThatHasEndedIsNotMissed) {
  const RankWatch root = Watch();
  {
    const RankWatch other(folder_.path(), "t", RankOfTwo(1), kLimit,
                          [](const std::string&) {});
    LetItLook();
  }
  EXPECT_EQ(Told(), "");
}

TEST_F(RankWatchTest, ARankThatDidNotComeToItsEndIsNamed) {
  const RankWatch root = Watch();
  try {
    const RankWatch other(folder_.path(), "t", RankOfTwo(1), kLimit,
                          [](const std::string&) {});
    LetItLook();
    throw std::runtime_error("it fails");
  } catch (const std::runtime_error&) {
  }
  EXPECT_NE(Told().find("rank 1 hangs"), std::string::npos);
}

TEST_F(RankWatchTest, ARankThatNeverCameIsNamed) {
  const RankWatch root = Watch();
  EXPECT_NE(Told().find("its file alive-t-1 is gone"), std::string::npos);
}

}  // namespace
}  // namespace routecast
