// Deaths while a store's ids are being coded. RocksDB's threads do not survive fork(), so
// this program uses RocksDB in children only.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include "storage/verify.h"
#include "tests/storage/context_store.h"

namespace routecast {
namespace {

constexpr int kDied = 99;

// Exit code of `work` in a child; 70 where an expectation failed, 71 for an exception.
int InChild(const std::function<void()>& work) {
  std::fflush(nullptr);
  const pid_t child = ::fork();
  if (child == 0) {
    try {
      work();
    } catch (const std::exception& e) {
      std::fprintf(stderr, "%s\n", e.what());
      ::_exit(71);
    }
    ::_exit(testing::Test::HasFailure() ? 70 : 0);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST_F(ContextStore, DeathAtAnyStepOfCodingLeavesAllReadableAndIsFinishedLater) {
  ASSERT_EQ(InChild([&] { Fill(); }), 0);
  fs::rename(store(), At("plain"));
  int deaths = 0;
  for (int step = 1;; ++step) {
    fs::remove_all(store());
    fs::copy(At("plain"), store(), fs::copy_options::recursive);
    const int code = InChild([&] {
      int steps = 0;
      Code([&](const char*) {
        if (++steps == step) ::_exit(kDied);
      });
    });
    ASSERT_EQ(InChild([&] { ExpectEverything(); }), 0);
    if (code == 0) break;
    ASSERT_EQ(code, kDied);
    ++deaths;
    ASSERT_EQ(InChild([&] {
                TraceStore::CleanStaging(store());
                Code();
                EXPECT_EQ(CodedShards(store()), config_.num_shards);
                EXPECT_TRUE(VerifyStore(store()).sound());
              }),
              0);
  }
  EXPECT_GT(deaths, 10);
}

}  // namespace
}  // namespace routecast
