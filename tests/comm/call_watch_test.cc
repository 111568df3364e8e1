// Ranks as threads over one folder: who is named when a call does not end.
#include "comm/call_watch.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <thread>

namespace routecast {
namespace {

using testing::HasSubstr;

fs::path Folder(const std::string& name) {
  const fs::path folder = fs::path(testing::TempDir()) / ("watch_" + name);
  fs::remove_all(folder);
  return folder;
}

RankInfo Rank(int rank, int world) {
  RankInfo info;
  info.rank = rank;
  info.world = world;
  return info;
}

// What each rank that waits says, of a world of three; `calls[r]` = how many calls rank r
// has begun, 0 = it never looks.
std::vector<std::string> Say(const fs::path& folder, const std::vector<int>& calls) {
  std::vector<std::string> said(calls.size());
  std::vector<std::thread> ranks;
  for (size_t r = 0; r < calls.size(); ++r) {
    if (calls[r] == 0) continue;
    ranks.emplace_back([&, r] {
      CallWatch watch(Rank(static_cast<int>(r), static_cast<int>(calls.size())), folder);
      uint64_t last = 0;
      for (int i = 0; i < calls[r]; ++i) {
        if (last > 0) watch.End(last);
        last = watch.Begin("all-reduce", 4096);
      }
      said[r] = watch.Overdue(last, 45, /*patience=*/0.4).what();
    });
  }
  for (std::thread& t : ranks) t.join();
  return said;
}

TEST(CallWatchTest, ASilentRankIsNamedByAllThatWait) {
  const auto said = Say(Folder("silent"), {7, 0, 7});
  for (const int r : {0, 2}) {
    EXPECT_THAT(said[size_t(r)], HasSubstr("collective call 7 (all-reduce, 4096 bytes)"));
    EXPECT_THAT(said[size_t(r)],
                HasSubstr("rank 1 did not come to it and does not answer"));
    EXPECT_THAT(said[size_t(r)], HasSubstr("rank " + std::to_string(r) + " of 3"));
  }
}

// It waits, too, but elsewhere: its calls are fewer.
TEST(CallWatchTest, ARankThatIsBehindIsNamed) {
  const auto said = Say(Folder("behind"), {9, 9, 4});
  EXPECT_THAT(said[0], HasSubstr("rank 2 did not come to it"));
  EXPECT_THAT(said[2], HasSubstr("collective call 4"));
}

TEST(CallWatchTest, AllThereMeansTheNetwork) {
  EXPECT_THAT(Say(Folder("network"), {3, 3})[0], HasSubstr("the network hangs"));
}

TEST(CallWatchTest, AnOlderJobsFilesAreNotTakenForAnswers) {
  const fs::path folder = Folder("old");
  Say(folder, {5, 5});
  fs::last_write_time(folder / "rank-1.jsonl",
                      fs::file_time_type::clock::now() - std::chrono::hours(1));
  EXPECT_THAT(Say(folder, {5, 0})[0],
              HasSubstr("rank 1 did not come to it and does not"));
}

TEST(CallWatchTest, TheLastThousandCallsAreKept) {
  CallWatch watch(Rank(0, 2), {});
  for (int i = 0; i < 1500; ++i) watch.End(watch.Begin("barrier", 0));
  watch.Begin("broadcast", 12);
  const std::string lines = watch.Lines();
  EXPECT_EQ(std::count(lines.begin(), lines.end(), '\n'), 1000);
  EXPECT_THAT(lines, HasSubstr("{\"number\":502,"));
  EXPECT_THAT(lines, testing::Not(HasSubstr("{\"number\":501,")));
  EXPECT_THAT(lines, HasSubstr("\"name\":\"broadcast\",\"bytes\":12"));
  EXPECT_THAT(lines, HasSubstr("\"seconds\":null"));
}

TEST(CallWatchTest, AFolderThatCannotBeWrittenIsSaid) {
  const fs::path file = Folder("file");
  WriteFileAtomic(file, "in the way");
  CallWatch watch(Rank(0, 2), file);
  EXPECT_THAT(watch.Overdue(watch.Begin("barrier", 0), 45, 0.1).what(),
              HasSubstr("could not be written"));
}

}  // namespace
}  // namespace routecast
