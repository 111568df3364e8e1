// Rows of a leaderboard against the best one, on the same documents.
#include "trainer/document_scores.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/errors.h"
#include "tests/storage/temp_folder.h"
#include "tests/trainer/training_in_memory.h"
#include "trainer/leaderboard.h"

namespace routecast {
namespace {

TEST(PairedDifferences, AreMeansOverSharedSeedsPlacesAndDocuments) {
  // Place (0,1): document 3 is asked of b alone; place (1,1) is b's alone; seed 9 too.
  const ScoresBySeed a = {{1, {{{0, 1}, {{1, 3, 4}, {2, 1, 2}}}, {{0, 2}, {{1, 1, 2}}}}}};
  const ScoresBySeed b = {{1,
                           {{{0, 1}, {{1, 1, 4}, {2, 2, 2}, {3, 0, 50}}},
                            {{0, 2}, {{1, 0, 2}}},
                            {{1, 1}, {{1, 0, 2}}}}},
                          {9, {{{0, 1}, {{1, 0, 4}}}}}};
  const auto d = DifferenceOf(a, b, 1);
  ASSERT_TRUE(d);
  EXPECT_DOUBLE_EQ(d->mean, ((4 / 6. - 3 / 6.) + (1 / 2. - 0)) / 2);
  EXPECT_EQ(d->documents, 2);
  EXPECT_EQ(d->seeds, (std::vector<uint64_t>{1}));
  EXPECT_DOUBLE_EQ(DifferenceOf(b, a, 1)->mean, -d->mean);
}

TEST(PairedDifferences, WhatIsHardForBothDoesNotWidenTheInterval) {
  // Documents differ much, the two rows by one answer in each.
  ScoresBySeed a, b;
  for (uint64_t document = 0; document < 40; ++document) {
    const auto right = static_cast<int64_t>(document % 10);
    a[1][{0, 1}].push_back({document, right + 1, 10});
    b[1][{0, 1}].push_back({document, right, 10});
  }
  const auto paired = DifferenceOf(a, b, 1);
  EXPECT_NEAR(paired->ci95_low, .1, 1e-12);
  EXPECT_NEAR(paired->ci95_high, .1, 1e-12);
  for (DocumentScore& d : a[1][{0, 1}]) {
    d.right = static_cast<int64_t>(9 - d.document % 10);
  }
  const auto apart = DifferenceOf(a, b, 1);
  EXPECT_LT(apart->ci95_low, -.1);
  EXPECT_GT(apart->ci95_high, .1);
}

TEST(PairedDifferences, NothingSharedGivesNone) {
  const ScoresBySeed a = {{1, {{{0, 1}, {{1, 3, 4}}}}}}, b = {{2, a.at(1)}};
  EXPECT_FALSE(DifferenceOf(a, b, 1));
  EXPECT_FALSE(DifferenceOf(a, {{1, {{{0, 1}, {{7, 3, 4}}}}}}, 1));
  EXPECT_FALSE(DifferenceOf(a, {}, 1));
}

class RowsApart : public testing::Test {
 protected:
  RowsApart() : traces_(TraceSynthesizer(2, 8, 16, 60, 5).Make(40, 6, 12, true)) {
    job_.entries = {"simple", "hidden"};
    job_.seeds = 2;
    job_.run.options.steps = 20;
    job_.run.options.sizes.width = 16;
    job_.run.options.global_batch = job_.run.options.micro_batch = 8;
    job_.run.options.validation_sequences = 4;
    job_.run.out = folder_.path() / "board";
    job_.run.quiet = true;
  }
  Json Make() {
    TraceDataset dataset(traces_.traces, traces_.geometry);
    LocalCommunicator comm;
    return MakeLeaderboard(job_, &dataset, {},
                           &comm);  // no stale gate: it answers not everywhere
  }
  TempFolder folder_;
  SyntheticTraces traces_;
  LeaderboardJob job_;
};

TEST_F(RowsApart, ADifferenceIsThatOfTheScoresThatRank) {
  const Json board = Make();
  const Json* best = nullptr;
  for (const Json& row : board["rows"]) {
    if (row["kind"] == board["best"]) best = &row;
  }
  ASSERT_NE(best, nullptr);
  EXPECT_FALSE(best->contains("estimate"));
  EXPECT_TRUE(best->at("to_best").is_null());
  int compared = 0;
  for (const Json& row : board["rows"]) {
    if (row.contains("estimate") || row["kind"] == board["best"]) continue;
    SCOPED_TRACE(row["kind"]);
    const Json& to_best = row["to_best"];
    ASSERT_TRUE(to_best.is_object());
    EXPECT_EQ(to_best["seeds"], (std::vector<int>{1, 2}));
    EXPECT_LE(to_best["ci95"][0], to_best["mean"]);
    EXPECT_GE(to_best["ci95"][1], to_best["mean"]);
    // A baseline that cannot answer some places is compared on those it can.
    if (row["scores"].size() != best->at("scores").size()) continue;
    ++compared;
    EXPECT_NEAR(
        to_best["mean"],
        row["decoder_top1"].get<double>() - best->at("decoder_top1").get<double>(),
        1e-12);
  }
  EXPECT_GE(compared, 3) << "both kinds but the best, and baselines";
  EXPECT_FALSE(board.contains("without_document_scores"));
  EXPECT_THAT(LeaderboardText(board), testing::HasSubstr("to best"));
  EXPECT_THAT(ReadFile(job_.run.out / "leaderboard.csv"),
              testing::HasSubstr(",to best,2.5 %,97.5 %,train s,"));
  EXPECT_THAT(ReadFile(job_.run.out / "leaderboard.html"),
              testing::HasSubstr("does not tell the two apart"));
}

TEST_F(RowsApart, ARunWithoutScoresByDocumentIsNamedAndTheTableMade) {
  Make();
  for (const char* seed : {"seed-1", "seed-2"}) {
    ASSERT_TRUE(fs::remove(job_.run.out / "simple" / seed / "documents.safetensors"));
  }
  const Json board = Make();
  EXPECT_EQ(board["without_document_scores"], std::vector<std::string>{"simple"});
  for (const Json& row : board["rows"]) {
    EXPECT_TRUE(row["kind"] != "simple" || row["to_best"].is_null());
  }
  EXPECT_THAT(LeaderboardText(board), testing::HasSubstr("older version): simple"));
  EXPECT_THAT(ReadFile(job_.run.out / "leaderboard.html"),
              testing::HasSubstr("older version): simple"));
}

TEST_F(RowsApart, ADamagedFileIsAnError) {
  job_.entries = {"simple"};
  Make();
  WriteFileAtomic(job_.run.out / "simple/seed-2/documents.safetensors", "cut");
  EXPECT_THROW(Make(), DataError);
}

}  // namespace
}  // namespace routecast
