// Jobs of many trainings, a leaderboard and a search: they train what is missing, read
// what is finished, and outlive a training that goes wrong.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>

#include "common/errors.h"
#include "tests/storage/temp_folder.h"
#include "tests/trainer/synthetic_traces.h"
#include "trainer/leaderboard.h"
#include "trainer/search.h"

namespace routecast {
namespace {

class ManyTrainings : public testing::Test {
 protected:
  static SyntheticTraces Traces(int sequences) {
    return TraceSynthesizer(/*layers=*/3, /*experts=*/8, /*width=*/24,
                            /*vocabulary=*/200, /*seed=*/5)
        .Make(sequences, 6, 24, /*every_hidden=*/false);
  }
  SpeculationJob Job(const std::string& name, const std::string& kind = "hidden") const {
    SpeculationJob job;
    job.options.kind = kind;
    job.options.global_batch = 16;
    job.options.micro_batch = 4;
    job.options.validate_every = 8;
    job.options.log_every = 5;
    job.options.validation_sequences = 8;
    job.options.test_sequences = 8;
    job.out = folder_ / name;
    job.quiet = true;
    return job;
  }
  TempFolder temporary_;
  const fs::path folder_ = temporary_.path();
};

TEST_F(ManyTrainings, ALeaderboardTrainsWhatIsMissing) {
  const SyntheticTraces traces = Traces(60);
  LeaderboardJob job;
  job.run = Job("board");
  job.run.options.steps = 4;
  job.run.options.sizes = {16, 2, 32, 1, 0, -1};
  job.entries = {"simple", "interlayer"};
  job.seeds = 2;
  job.pass_us = 1;
  const auto make = [&] {
    TraceDataset dataset(traces.traces, traces.geometry);
    LocalCommunicator comm;
    return MakeLeaderboard(job, &dataset, traces.routers, &comm);
  };
  const Json board = make();
  int models = 0, baselines = 0;
  for (const Json& row : board["rows"]) {
    row.contains("baseline") ? ++baselines : ++models;
    if (row.contains("baseline")) continue;
    EXPECT_EQ(row["seeds"], Json({1, 2}));
    EXPECT_TRUE(row["offline_only"].get<bool>());  // of a pass of one microsecond
  }
  EXPECT_EQ(models, 2);
  EXPECT_EQ(baselines, 9 + 3);  // three estimates by neighbours
  EXPECT_EQ(ReadJsonFile(job.run.out / "leaderboard.json"), board);
  EXPECT_THAT(ReadFile(job.run.out / "leaderboard.html"), testing::HasSubstr("simple"));
  EXPECT_THAT(ReadFile(job.run.out / "leaderboard.csv"), testing::HasSubstr("markov"));
  // Finished runs are read, not trained again; a finished folder is an entry, too.
  const auto written = fs::last_write_time(job.run.out / "simple/seed-1/results.json");
  job.entries = {"simple", (job.run.out / "interlayer/seed-2").string()};
  EXPECT_EQ(make()["rows"].size(), 2u + 9 + 3);
  for (const Json& row : board["rows"]) {
    if (!row.contains("estimate")) continue;
    EXPECT_GT(row["decoder_top1"].get<double>(), 0.125);  // of 8 experts
    EXPECT_LE(row["decoder_top1"].get<double>(), 1);
  }
  EXPECT_EQ(fs::last_write_time(job.run.out / "simple/seed-1/results.json"), written);
  job.entries = {(folder_ / "nothing").string()};
  EXPECT_THROW(make(), UsageError);
}

TEST_F(ManyTrainings, ASearchKeepsTheBetterTrialsAndGoesOn) {
  const SyntheticTraces traces = Traces(60);
  SearchJob job;
  job.space = SearchSpace::FromJson(Json::parse(R"({"trials": 4, "factor": 2, "rungs": 2,
                      "space": {"learning_rate": {"log": [1e-4, 1e-2]}}})"),
                                    "space");
  job.run = Job("search", "simple");
  job.run.options.steps = 8;
  job.run.options.sizes = {16, 2, 32, 1, 0, -1};
  const auto search = [&] {
    TraceDataset dataset(traces.traces, traces.geometry);
    LocalCommunicator comm;
    return Search(job, &dataset, traces.routers, &comm);
  };
  const Json found = search();
  ASSERT_EQ(found["trials"].size(), 4u);
  for (size_t i = 0; i < 4; ++i) {
    const Json& rungs = found["trials"][i]["rungs"];
    ASSERT_EQ(rungs.size(), i < 2 ? 2u : 1u);
    EXPECT_EQ(rungs[0]["steps"], 4);
  }
  const auto loss = [&](size_t i, size_t rung) {
    return found["trials"][i]["rungs"][rung]["validation_loss"].get<double>();
  };
  EXPECT_LE(loss(0, 1), loss(1, 1));
  EXPECT_LE(std::max(loss(0, 0), loss(1, 0)), std::min(loss(2, 0), loss(3, 0)));
  EXPECT_THAT(ReadFile(job.run.out / "best.flags"),
              testing::HasSubstr("--learning_rate="));
  // What is finished is read; what is missing is made again, with the same result.
  const fs::path kept = job.run.out / "rung-0/trial-0001/results.json";
  const auto written = fs::last_write_time(kept);
  fs::remove_all(job.run.out / "rung-0/trial-0002");
  EXPECT_EQ(search(), found);
  EXPECT_EQ(fs::last_write_time(kept), written);
}

// What stays as it is belongs to the best options, too.
TEST_F(ManyTrainings, ASearchLeavesAllOptionsOfItsBestTrial) {
  const SyntheticTraces traces = Traces(40);
  SearchJob job;
  job.space = SearchSpace::FromJson(
      Json::parse(R"({"trials": 1, "rungs": 1, "space": {"learning_rate": [0.1]}})"),
      "space");
  job.run = Job("search", "simple");
  job.run.options.steps = 2;
  job.given = {{"width", "16"}, {"schedule", "constant"}, {"learning_rate", "7"}};
  TraceDataset dataset(traces.traces, traces.geometry);
  LocalCommunicator comm;
  Search(job, &dataset, traces.routers, &comm);
  EXPECT_EQ(ReadFile(job.run.out / "best.flags"),
            "# The best of 1 trials.\n--kind=simple\n--steps=2\n--schedule=constant\n"
            "--width=16\n--learning_rate=0.10000000000000001\n");
}

// The same documents, of equal lengths, routed by another model.
TEST_F(ManyTrainings, WhatWasTrainedOnAnotherModelsTracesIsNotTaken) {
  const SyntheticTraces traces = Traces(40);
  SyntheticTraces others = traces;
  for (RoutingTrace& trace : others.traces) {
    for (RoutingSpan* span : {&trace.encoder, &trace.decoder}) {
      for (uint16_t& expert : span->expert_ids)
        expert = static_cast<uint16_t>(expert ^ 1);
    }
  }
  LocalCommunicator comm;
  TraceDataset here(traces.traces, traces.geometry),
      there(others.traces, others.geometry);
  SearchJob search;
  search.space = SearchSpace::FromJson(
      Json::parse(R"({"trials": 1, "rungs": 1, "space": {"learning_rate": [0.01]}})"),
      "space");
  search.run = Job("search", "interlayer");
  search.run.options.steps = 2;
  search.run.options.sizes = {16, 2, 32, 1, 0, -1};
  const Json found = Search(search, &here, {}, &comm);
  EXPECT_NE(Search(search, &there, {}, &comm), found);

  LeaderboardJob board;
  board.run = search.run;
  board.run.out = folder_ / "board";
  board.entries = {"interlayer"};
  board.seeds = 1;
  const auto row = [](const Json& made) {
    for (const Json& r : made["rows"]) {
      if (r["kind"] == "interlayer") return r["scores"];
    }
    return Json();
  };
  const Json made = row(MakeLeaderboard(board, &here, {}, &comm));
  EXPECT_NE(row(MakeLeaderboard(board, &there, {}, &comm)), made);
  board.entries = {(folder_ / "board/interlayer/seed-1").string()};  // of `there` by now
  try {
    MakeLeaderboard(board, &here, {}, &comm);
    FAIL() << "nothing was refused";
  } catch (const UsageError& e) {
    EXPECT_THAT(e.what(), testing::HasSubstr("was trained on another store"));
  }

  SpeculationJob run = search.run;
  run.out = folder_ / "run";
  run.stop_after = 1;
  EXPECT_THROW(TrainSpeculation(run, &here, {}, &comm), StoppedError);
  EXPECT_THROW(TrainSpeculation(run, &there, {}, &comm), UsageError);
}

// A rate at which nothing is a number any more is a bad trial, not the end of the search.
TEST_F(ManyTrainings, ASearchOutlivesATrialThatDiverges) {
  const SyntheticTraces traces = Traces(60);
  SearchJob job;
  job.space = SearchSpace::FromJson(Json::parse(R"({"trials": 6, "factor": 2, "rungs": 2,
                      "space": {"learning_rate": [1e-3, 1e36]}})"),
                                    "space");
  job.run = Job("search", "simple");
  job.run.options.steps = 8;
  job.run.options.sizes = {16, 2, 32, 1, 0, -1};
  TraceDataset dataset(traces.traces, traces.geometry);
  LocalCommunicator comm;
  const Json found = Search(job, &dataset, traces.routers, &comm);
  ASSERT_EQ(found["trials"].size(), 6u);
  EXPECT_EQ(found["trials"][0]["values"]["learning_rate"], 1e-3);
  const Json& worst = found["trials"][5];
  EXPECT_EQ(worst["values"]["learning_rate"], 1e36);
  EXPECT_TRUE(worst["rungs"][0]["validation_loss"].is_null());
  EXPECT_THAT(SearchText(found), testing::HasSubstr("diverged"));
  // It is not tried again.
  char name[32];
  std::snprintf(name, sizeof name, "trial-%04d", worst["trial"].get<int>());
  const fs::path mark = job.run.out / "rung-0" / name / "diverged.json";
  const auto written = fs::last_write_time(mark);
  EXPECT_EQ(Search(job, &dataset, traces.routers, &comm), found);
  EXPECT_EQ(fs::last_write_time(mark), written);
  job.space = SearchSpace::FromJson(
      Json::parse(R"({"trials": 2, "space": {"learning_rate": [1e36]}})"), "space");
  job.run.out = folder_ / "hopeless";
  EXPECT_THROW(Search(job, &dataset, traces.routers, &comm), UsageError);
}

}  // namespace
}  // namespace routecast
