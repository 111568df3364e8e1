// Deaths and full disks. RocksDB's threads do not survive fork(), so this program uses
// RocksDB in children only.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <set>

#include "common/errors.h"
#include "storage/export.h"
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

// The signal that ended `work`; 0 where it ran to its end.
int KilledBy(const std::function<void()>& work) {
  const pid_t child = ::fork();
  if (child == 0) {
    work();
    ::_exit(0);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFSIGNALED(status) ? WTERMSIG(status) : 0;
}

// As by kill -9 in the middle of a file: the system ends a process that writes beyond
// its limit, and no destructor runs.
TEST_F(TraceStoreTest, WhatAKilledExportLeftGoesWithTheNext) {
  ASSERT_EQ(InChild([&] { Fill(); }), 0);
  const fs::path out = folder_.path() / "out";
  const auto names = [&] {
    std::set<std::string> found;
    for (const auto& entry : fs::directory_iterator(out)) {
      found.insert(entry.path().filename());
    }
    return found;
  };
  const ExportOptions text{.format = "csv"}, arrays{.format = "npz"},
      parts{.format = "npz", .max_part_bytes = 5000};
  struct Case {
    ExportOptions killed, next;
    const char* file;
  };
  // The last one is killed in a part that the next export does not have.
  for (const Case& c :
       {Case{text, text, "traces.csv"}, Case{arrays, arrays, "traces.npz"},
        Case{parts, arrays, "traces.npz"}}) {
    fs::remove_all(out);
    EXPECT_EQ(KilledBy([&] {
                const TraceReader reader(store());
                std::signal(SIGXFSZ, SIG_DFL);
                const rlimit none{0, 0}, few{1000, 1000};
                ::setrlimit(RLIMIT_CORE, &none);
                ::setrlimit(RLIMIT_FSIZE, &few);
                ExportTraces(reader, out, c.killed);
              }),
              SIGXFSZ);
    ASSERT_EQ(names().size(), 1u);
    ASSERT_TRUE(names().begin()->ends_with(".tmp"));
    EXPECT_EQ(InChild([&] { ExportTraces(TraceReader(store()), out, c.next); }), 0);
    EXPECT_EQ(names(), std::set<std::string>{c.file});
  }
}

}  // namespace
}  // namespace routecast
