// What --dry_run says of leaderboards and searches follows what is there, and the pass of
// a leaderboard is timed on the model that was traced.
#include "trainer/run_plan.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/errors.h"
#include "tests/storage/temp_folder.h"
#include "tests/support/tiny_checkpoint.h"
#include "tests/trainer/synthetic_traces.h"
#include "trainer/question_timing.h"
#include "trainer/speculation_size.h"

namespace routecast {
namespace {

class RunPlan : public testing::Test {
 protected:
  RunPlan()
      : traces_(TraceSynthesizer(/*layers=*/2, /*experts=*/8, /*width=*/32,
                                 /*vocabulary=*/100, /*seed=*/5)
                    .Make(40, 6, 12, /*every_hidden=*/true)),
        dataset_(traces_.traces, traces_.geometry) {}
  LeaderboardJob Board() const {
    LeaderboardJob job;
    job.entries = {"simple", "interlayer"};
    job.seeds = 2;
    job.run.options.steps = 4;
    job.run.options.sizes = {16, 2, 32, 1, 0, -1};
    job.run.options.global_batch = job.run.options.micro_batch = 8;
    job.run.options.validation_sequences = job.run.options.test_sequences = 4;
    job.run.out = folder_.path() / "board";
    job.run.quiet = true;
    return job;
  }
  std::string Plan(const LeaderboardJob& job) {
    return DescribeLeaderboard(job, &dataset_, /*routers=*/true, /*world=*/2);
  }
  Json Make(const LeaderboardJob& job) {
    return MakeLeaderboard(job, &dataset_, traces_.routers, &comm_);
  }
  TempFolder folder_;
  SyntheticTraces traces_;
  TraceDataset dataset_;
  LocalCommunicator comm_;
};

TEST_F(RunPlan, ALeaderboardsPlanCountsWhatIsDoneAndBegun) {
  LeaderboardJob job = Board();
  EXPECT_THAT(Plan(job),
              testing::HasSubstr("4 runs: 0 done, 0 begun, 4 to go; 16 steps"));
  EXPECT_FALSE(fs::exists(job.run.out)) << "a plan writes nothing";
  LeaderboardJob one = job;
  one.entries = {"simple"};
  Make(one);
  job.run.stop_after = 3;
  EXPECT_THROW(Make(job), StoppedError);  // in the first seed of the second kind
  EXPECT_THAT(Plan(job), testing::HasSubstr("4 runs: 2 done, 1 begun, 2 to go; 5 steps"));
  job.run.options.training.learning_rate = 0.5;  // then the finished ones are others
  EXPECT_THAT(Plan(job), testing::HasSubstr("4 runs: 0 done"));
  job.entries = {(folder_.path() / "nothing").string()};
  EXPECT_THROW(Plan(job), UsageError);
}

TEST_F(RunPlan, ALeaderboardsPlanSaysSizes) {
  LeaderboardJob job = Board();
  job.entries = {"simple"};
  const SpeculationSize size =
      SizeOf(RunOf(job, {"simple", true, {"x"}}, 0).options, &dataset_);
  EXPECT_EQ(size.bytes, static_cast<uint64_t>(size.parameters) * 20);
  const std::string plan = Plan(job);
  EXPECT_THAT(plan, testing::HasSubstr(std::to_string(size.parameters)));
  EXPECT_THAT(plan, testing::HasSubstr(FormatBytes(size.bytes)));
  EXPECT_THAT(plan, testing::HasSubstr((job.run.out / "leaderboard.").string()));
}

TEST_F(RunPlan, ASearchsPlanFollowsItsRungs) {
  SearchJob job;
  job.space = SearchSpace::FromJson(Json::parse(R"({"trials": 4, "factor": 2, "rungs": 2,
                      "space": {"width": [8, 16, 24, 32]}})"),
                                    "space");
  job.run = Board().run;
  job.run.options.kind = "simple";
  job.run.options.sizes = {};
  job.run.options.steps = 8;
  job.run.out = folder_.path() / "search";
  const auto plan = [&] { return DescribeSearch(job, &dataset_, 2); };
  EXPECT_THAT(plan(), testing::HasSubstr("6 runs: 0 done, 0 begun, 6 to go; 32 steps"));
  int64_t largest = 0;
  for (int t = 0; t < 4; ++t) {
    const SpeculationOptions options = TrialRun(job, t, 0).options;
    largest = std::max(largest, SizeOf(options, &dataset_).parameters);
  }
  EXPECT_THAT(plan(),
              testing::HasSubstr("at most " + std::to_string(largest) + " parameters"));
  TrainSpeculation(TrialRun(job, 2, 0), &dataset_, traces_.routers, &comm_);
  EXPECT_THAT(plan(), testing::HasSubstr("6 runs: 1 done, 0 begun, 5 to go; 28 steps"));
  Search(job, &dataset_, traces_.routers, &comm_);
  EXPECT_THAT(plan(), testing::HasSubstr("6 runs: 6 done, 0 begun, 0 to go; 0 steps"));
  job.run.options.steps = 0;
  EXPECT_THROW(plan(), UsageError);
}

TEST_F(RunPlan, ATrialThatCannotBeIsRefusedBeforeAnyIsTrained) {
  SearchJob job;
  job.space = SearchSpace::FromJson(
      Json::parse(R"({"trials": 9, "space": {"width": [16, 17]}})"), "space");
  job.run = Board().run;
  job.run.options.kind = "interlayer";
  job.run.out = folder_.path() / "search";
  EXPECT_THROW(DescribeSearch(job, &dataset_, 2), UsageError);
  EXPECT_THROW(Search(job, &dataset_, traces_.routers, &comm_), UsageError);
  EXPECT_FALSE(fs::exists(job.run.out));
}

TEST_F(RunPlan, ThePassIsTimedOnTheModelThatWasTraced) {
  LeaderboardJob job = Board();
  job.entries = {"simple"};
  job.seeds = 1;
  job.checkpoint = WriteCheckpoint(folder_.path() / "model", 1);
  const Json board = Make(job);
  EXPECT_GT(board["pass_us"], 1.0);
  EXPECT_EQ(board["pass_model"], job.checkpoint.string());
  for (const Json& row : board["rows"]) {
    if (row.contains("baseline")) continue;
    EXPECT_GT(row["predict_us"], 0.0);
    EXPECT_GT(row["predict_flops"], 0.0);
    // Three questions a pass: before the first layer, and at each of the two.
    EXPECT_EQ(row["offline_only"], row["predict_us"].get<double>() * 3 >
                                       0.05 * board["pass_us"].get<double>());
  }
  EXPECT_THAT(ReadFile(job.run.out / "leaderboard.html"),
              testing::HasSubstr("timed beside the questions"));
}

TEST_F(RunPlan, AnotherModelsPassIsRefusedBeforeAnythingIsTrained) {
  LeaderboardJob job = Board();
  job.checkpoint = WriteCheckpoint(folder_.path() / "model", 1);
  traces_ = TraceSynthesizer(3, 8, 32, 100, 5).Make(40, 6, 12, true);
  dataset_ = TraceDataset(traces_.traces, traces_.geometry);
  EXPECT_THROW(Make(job), UsageError);
  EXPECT_THROW(Plan(job), UsageError);
  EXPECT_FALSE(fs::exists(job.run.out));
}

}  // namespace
}  // namespace routecast
