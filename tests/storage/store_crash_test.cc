// Deaths and full disks. RocksDB's threads do not survive fork(), so this program uses
// RocksDB in children only.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <set>

#include "common/errors.h"
#include "storage/store_lock.h"
#include "tests/storage/store_fixture.h"

namespace routecast {
namespace {

// Exit code of `work` in a child; 70 where an expectation failed, 71 for an exception.
int InChild(const std::function<void()>& work) {
  std::fflush(nullptr);
  const pid_t child = ::fork();
  if (child == 0) {
    try {
      work();
    } catch (const EnvironmentError&) {
      ::_exit(kExitEnvironment);
    } catch (const std::exception& e) {
      std::fprintf(stderr, "%s\n", e.what());
      ::_exit(71);
    }
    ::_exit(testing::Test::HasFailure() ? 70 : 0);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  EXPECT_TRUE(WIFEXITED(status));
  return WEXITSTATUS(status);
}

constexpr int kDied = 99;

TEST_F(TraceStoreTest, DeathAtAnyStepLosesAndDoublesNothing) {
  shape_.heads = 2;  // files of all column families
  config_ = ConfigOf(shape_, 4, kChunks);
  Create();
  const auto job_dying_at = [&](int n) {
    int steps = 0;
    const auto at = [&](const char*) {
      if (++steps == n) ::_exit(kDied);
    };
    StoreLock lock(store());
    TraceStore::CleanStaging(store());
    ShardOwner owner(store(), config_, 0, 1, at);
    const auto done = owner.CompletedChunks();
    const std::set<uint32_t> complete(done.begin(), done.end());
    for (uint32_t c = 0; c < kChunks; ++c) {
      if (complete.contains(c)) continue;
      StageChunk(store(), config_, c, kPerChunk, shape_, lock.token(), at);
      owner.Ingest(c, lock.token());
    }
    owner.Compact();
  };
  int deaths = 0;
  for (int step = 1;; ++step) {
    const int code = InChild([&] { job_dying_at(step); });
    // Readable after every death, with whole chunks only.
    ASSERT_EQ(InChild([&] {
                EXPECT_EQ(TraceReader(store()).sequences().size() % kPerChunk, 0u);
              }),
              0);
    if (code == 0) break;
    ASSERT_EQ(code, kDied);
    ++deaths;
  }
  EXPECT_GT(deaths, 10);
  EXPECT_EQ(InChild([&] { ExpectEverything(); }), 0);
}

TEST_F(TraceStoreTest, AFullDiskIsAnErrorAndLeavesNothing) {
  ASSERT_EQ(InChild([&] { Fill(5); }), 0);
  EXPECT_EQ(InChild([&] {
              std::signal(SIGXFSZ, SIG_IGN);
              const rlimit limit{2000, 2000};
              ::setrlimit(RLIMIT_FSIZE, &limit);
              StageChunk(store(), config_, 5, kPerChunk, shape_, "full");
            }),
            kExitEnvironment);
  EXPECT_TRUE(fs::is_empty(store() / "staging"));
  EXPECT_EQ(InChild([&] {
              ShardOwner owner(store(), config_, 0, 1);
              EXPECT_EQ(owner.CompletedChunks().size(), 5u);
              StageChunk(store(), config_, 5, kPerChunk, shape_, "t");
              owner.Ingest(5, "t");
            }),
            0);
  EXPECT_EQ(InChild([&] { ExpectEverything(); }), 0);
}

}  // namespace
}  // namespace routecast
