// What a leaderboard says of time and size, and the time that a kind may take.
#include "trainer/leaderboard.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/errors.h"
#include "report/html_report.h"
#include "tests/storage/temp_folder.h"
#include "tests/trainer/training_in_memory.h"
#include "trainer/document_scores.h"
#include "trainer/leaderboard_rows.h"
#include "trainer/run_plan.h"

namespace routecast {
namespace {

Json Row() {
  return {{"decoder_top1", 0.5},   {"encoder_top1", 0.25},  {"decoder_recall", 0.75},
          {"parameters", 2000000}, {"predict_us", nullptr}, {"training_seconds", 20.0}};
}

TEST(LeaderboardRates, AreOfTheScoreThatRanks) {
  Json row = Row();
  AddRates({3, 3, 8, 1, 24}, &row);
  EXPECT_DOUBLE_EQ(row["times_chance"], 0.5 * 8);
  EXPECT_DOUBLE_EQ(row["points_per_second"], 50 / 20.0);
  EXPECT_DOUBLE_EQ(row["points_per_million_parameters"], 50 / 2.0);
}

TEST(LeaderboardRates, WithoutADecoderTheEncoderRanks) {
  Json row = Row();
  AddRates({3, 0, 8, 1, 24}, &row);
  EXPECT_DOUBLE_EQ(row["times_chance"], 0.25 * 8);
}

TEST(LeaderboardRates, ChanceIsOfAllExpertsOfAToken) {
  Json row = Row();
  AddRates({0, 3, 32, 4, 24}, &row);
  EXPECT_DOUBLE_EQ(row["times_chance"], 0.75 * 32 / 4);
  EXPECT_DOUBLE_EQ(row["points_per_second"], 75 / 20.0);
}

TEST(LeaderboardRates, WhatIsNotKnownGivesNone) {
  Json row = Row();
  row["training_seconds"] = row["parameters"] = nullptr;
  AddRates({3, 3, 8, 1, 24}, &row);
  EXPECT_TRUE(row["points_per_second"].is_null());
  EXPECT_TRUE(row["points_per_million_parameters"].is_null());
  EXPECT_DOUBLE_EQ(row["times_chance"], 4);
  row["decoder_top1"] = nullptr;
  AddRates({3, 3, 8, 1, 24}, &row);
  EXPECT_TRUE(row["times_chance"].is_null());
}

TEST(LeaderboardRates, SecondsAreTheMeanOverSeedsThatAllSayThem) {
  const auto results = [](double seconds) {
    return Json{{"seed", 1},
                {"parameters", 100},
                {"validation", {{"loss", 1.0}}},
                {"scores", Json::array()},
                {"training_seconds", seconds}};
  };
  Json row = LeaderboardRow("x", {results(2), results(5)}, 1, 0, 4);
  EXPECT_DOUBLE_EQ(row["training_seconds"], 3.5);
  EXPECT_FALSE(row.contains("stopped_by_time"));
  Json unknown = results(5), ended = results(5);
  unknown.erase("training_seconds");
  ended["time_limit"] = 5;
  row = LeaderboardRow("x", {results(2), unknown, ended}, 1, 0, 4);
  EXPECT_TRUE(row["training_seconds"].is_null());
  EXPECT_EQ(row["stopped_by_time"], 1);
}

// 600 places a row, as 24 decoder layers have them. The page was refused, and with it
// leaderboard.json was never written.
TEST(LeaderboardPage, OfManyPlacesLeavesOutTheLastRows) {
  Json results = {{"seed", 1},
                  {"parameters", 100},
                  {"validation", {{"loss", 1.0}}},
                  {"scores", Json::array()},
                  {"training_seconds", 2.0}};
  for (int layer = -1; layer < 24; ++layer) {
    for (int lead = 1; lead <= 24; ++lead) {
      results["scores"].push_back({{"phase", "decoder"},
                                   {"layer", layer},
                                   {"lead", lead},
                                   {"top1", .5},
                                   {"top4", .75},
                                   {"cross_entropy", 1.5},
                                   {"ece", .01},
                                   {"ci95", {.4, .6}}});
    }
  }
  Json board = {{"store", "store"}, {"rows", Json::array()}};
  for (int i = 0; i < 20; ++i) {
    board["rows"].push_back(
        LeaderboardRow("row " + std::to_string(10 + i), {results}, 1, 0, 25));
  }
  const std::string page = LeaderboardHtml(board);
  EXPECT_LE(page.size(), HtmlReport::kMaxBytes);
  EXPECT_THAT(page, testing::HasSubstr("<summary>row 10<"));
  EXPECT_THAT(page, testing::HasSubstr("row 29: left out, as the page would be larger"));
}

Json RowOver(const char* kind, double top1, int decoder_places) {
  return {{"kind", kind},
          {"decoder_top1", top1},
          {"parameters", 100},
          {"predict_us", nullptr},
          {"training_seconds", 2.0},
          {"places", {{"encoder", 3}, {"decoder", decoder_places}}}};
}

TEST(LeaderboardPlaces, AMeanOverFewerPlacesNeverLeads) {
  const MoeGeometry geometry = {3, 3, 8, 1, 24};
  Json board = {
      {"rows",
       {RowOver("fewer", .9, 3), RowOver("low", .3, 12), RowOver("high", .5, 12)}}};
  MarkFewerPlaces(geometry, &board);
  EXPECT_EQ(board["places"], Json({{"encoder", 3}, {"decoder", 12}}));
  AddDifferences({{}, {}, {}}, "decoder_top1", 1, &board);
  EXPECT_EQ(board["best"], "high");
  std::vector<Json> rows = board["rows"];
  RankRows("decoder_top1", &rows);
  EXPECT_EQ(rows[0]["kind"], "high");
  EXPECT_EQ(rows[1]["kind"], "low");
  EXPECT_EQ(rows[2]["kind"], "fewer");
  for (Json& row : rows) AddRates(geometry, &row);
  EXPECT_DOUBLE_EQ(rows[1]["times_chance"], .3 * 8);
  EXPECT_TRUE(rows[2]["times_chance"].is_null());
  EXPECT_TRUE(rows[2]["points_per_second"].is_null());
}

class KindSeconds : public testing::Test {
 protected:
  KindSeconds() : traces_(TraceSynthesizer(2, 8, 16, 60, 5).Make(40, 6, 12, true)) {
    job_.entries = {"simple"};
    job_.seeds = 2;
    job_.run.options.steps = 8;
    job_.run.options.sizes = {16, 2, 32, 1, 0, -1};
    job_.run.options.global_batch = job_.run.options.micro_batch = 8;
    job_.run.options.validate_every = 4;
    job_.run.options.validation_sequences = job_.run.options.test_sequences = 4;
    job_.run.out = folder_.path() / "board";
    job_.run.quiet = true;
  }
  Json Make() {
    TraceDataset dataset(traces_.traces, traces_.geometry);
    LocalCommunicator comm;
    return MakeLeaderboard(job_, &dataset, traces_.routers, &comm);
  }
  void DropHidden() {
    for (RoutingTrace& trace : traces_.traces) {
      for (RoutingSpan* span : {&trace.encoder, &trace.decoder}) {
        span->hidden.clear();
        span->hidden_width = 0;
      }
    }
  }
  static Json RowOf(const Json& board, const std::string& kind) {
    for (const Json& row : board["rows"]) {
      if (row["kind"] == kind) return row;
    }
    ADD_FAILURE() << "no row of " << kind;
    return {};
  }
  Json ResultsOf(int seed) const {
    return ReadJsonFile(job_.run.out / "simple" / ("seed-" + std::to_string(seed)) /
                        "results.json");
  }
  SpeculationJob Run(int number) {
    TraceDataset dataset(traces_.traces, traces_.geometry);
    return RunOf(job_, EntriesOf(job_, &dataset, true)[0], size_t(number));
  }
  TempFolder folder_;
  SyntheticTraces traces_;
  LeaderboardJob job_;
};

TEST_F(KindSeconds, AKindOverItsTimeKeepsItsBestAndItsRowSaysSo) {
  job_.kind_seconds = 1e-6;
  const Json board = Make();
  for (const int seed : {1, 2}) {
    EXPECT_EQ(ResultsOf(seed)["steps"], 1)
        << "the step that exceeds the time is the last";
    EXPECT_EQ(ResultsOf(seed)["best_step"], 1) << "and is validated";
  }
  EXPECT_EQ(RowOf(board, "simple")["stopped_by_time"], 2);
  LoadSpeculationModel(job_.run.out / "simple/seed-1");
  EXPECT_THAT(LeaderboardText(board), testing::HasSubstr("simple (stopped by time)"));
  EXPECT_THAT(ReadFile(job_.run.out / "leaderboard.csv"),
              testing::HasSubstr("simple (stopped by time)"));
  EXPECT_THAT(ReadFile(job_.run.out / "leaderboard.html"),
              testing::HasSubstr("--kind_seconds"));
}

TEST_F(KindSeconds, SettingsAreARowWithOptionsOfTheirOwn) {
  SpeculationOptions own = job_.run.options;
  own.kind = "simple";
  own.steps = 4;
  own.sizes.width = 24;
  own.seed = 77;  // the job's seeds count
  job_.entries = {"simple", "wide.flags"};
  job_.settings["wide.flags"] = own;
  const Json board = Make();
  EXPECT_EQ(RowOf(board, "wide.flags")["seeds"], (std::vector<int>{1, 2}));
  EXPECT_NE(RowOf(board, "wide.flags")["parameters"],
            RowOf(board, "simple")["parameters"]);
  EXPECT_EQ(ReadJsonFile(job_.run.out / "wide.flags/seed-2/results.json")["steps"], 4);
  EXPECT_EQ(ResultsOf(2)["steps"], 8);
}

TEST_F(KindSeconds, SettingsThatTheTracesCannotServeAreRefusedBeforeAnyTraining) {
  job_.entries = {"simple", "distilled.flags"};
  job_.settings["distilled.flags"] = job_.run.options;
  job_.settings["distilled.flags"].distill_weight = .5;  // no top-k was recorded
  EXPECT_THROW(Make(), UsageError);
  EXPECT_FALSE(fs::exists(job_.run.out));
}

// The stale gate answers where a router input was and there is a router for it.
TEST_F(KindSeconds, TheTableSaysWhoseMeansAreOverFewerPlaces) {
  job_.seeds = 1;
  const Json board = Make();
  const Json gate = RowOf(board, "stale_gate"), simple = RowOf(board, "simple");
  EXPECT_LT(gate["places"]["decoder"], simple["places"]["decoder"]);
  EXPECT_EQ(gate["fewer_places"], true);
  EXPECT_EQ(simple["fewer_places"], false);
  bool fewer = false;
  for (const Json& row : board["rows"]) {
    EXPECT_TRUE(row["fewer_places"] == true || !fewer) << row["kind"];
    fewer = row["fewer_places"].get<bool>();
  }
  EXPECT_THAT(LeaderboardText(board), testing::HasSubstr("rows that answer fewer"));
  EXPECT_THAT(ReadFile(job_.run.out / "leaderboard.csv"), testing::HasSubstr(",places,"));
}

TEST_F(KindSeconds, AKindThatTheStoreCannotServeIsRefusedBeforeAnyTraining) {
  DropHidden();
  job_.entries = {"simple", "hidden"};
  EXPECT_THROW(Make(), UsageError);
  EXPECT_FALSE(fs::exists(job_.run.out));
}

TEST_F(KindSeconds, AllSaysWhatItLeavesOutAndWhy) {
  DropHidden();
  job_.entries = {"all"};
  TraceDataset dataset(traces_.traces, traces_.geometry);
  const Json left_out = KindsLeftOut(job_, &dataset, true);
  ASSERT_TRUE(left_out.contains("router inputs")) << left_out;
  EXPECT_THAT(DescribeLeaderboard(job_, &dataset, true, 1),
              testing::HasSubstr("left out, as the store has no router inputs: hidden"));
  job_.entries = {"hidden"};
  EXPECT_TRUE(KindsLeftOut(job_, &dataset, true).empty());
}

TEST_F(KindSeconds, EnoughTimeChangesNothing) {
  job_.kind_seconds = 3600;
  const Json board = Make();
  EXPECT_EQ(ResultsOf(1)["steps"], 8);
  const Json row = RowOf(board, "simple");
  EXPECT_FALSE(row.contains("stopped_by_time"));
  EXPECT_GT(row["training_seconds"], 0.0);
  const double points = 100 * row["decoder_top1"].get<double>();
  EXPECT_DOUBLE_EQ(row["points_per_second"],
                   points / row["training_seconds"].get<double>());
  EXPECT_GT(RowOf(board, "frequency")["times_chance"], 0.0);
  EXPECT_TRUE(RowOf(board, "frequency")["points_per_second"].is_null());
  EXPECT_THAT(ReadFile(job_.run.out / "leaderboard.csv"),
              testing::AllOf(testing::HasSubstr("x chance,"),
                             testing::HasSubstr(",train s,points/s,points/M\r\n")));
  EXPECT_THAT(ReadFile(job_.run.out / "leaderboard.html"),
              testing::HasSubstr("points/M"));
  EXPECT_THAT(LeaderboardText(board), testing::HasSubstr("points/s"));
}

TEST_F(KindSeconds, AFinishedRunIsKeptAsItIs) {
  Make();
  EXPECT_EQ(KeepFinished(Run(0)), ResultsOf(1));
}

TEST_F(KindSeconds, SeedsShareATimeAndMoreOfItTrainsAgain) {
  job_.kind_seconds = 10;
  EXPECT_DOUBLE_EQ(Run(0).time_limit, 5);
  TraceDataset dataset(traces_.traces, traces_.geometry);
  EXPECT_THAT(DescribeLeaderboard(job_, &dataset, true, 1),
              testing::HasSubstr("5 s of training each at most"));
  job_.kind_seconds = 1e-6;
  Make();
  EXPECT_TRUE(IsFinished(Run(0), dataset));
  job_.kind_seconds = 1e-7;
  EXPECT_TRUE(IsFinished(Run(0), dataset)) << "less time ends no later";
  job_.kind_seconds = 2e-6;
  EXPECT_FALSE(IsFinished(Run(0), dataset));
  job_.kind_seconds = 0;
  EXPECT_FALSE(IsFinished(Run(0), dataset));
}

TEST_F(KindSeconds, TheTimeOfAStoppedRunCounts) {
  SpeculationJob run = Run(0);
  run.stop_after = 2;
  TraceDataset dataset(traces_.traces, traces_.geometry);
  LocalCommunicator comm;
  const auto train = [&] {
    return TrainSpeculation(run, &dataset, traces_.routers, &comm);
  };
  EXPECT_THROW(train(), StoppedError);
  const fs::path seconds = run.out / "state/seconds.json";
  EXPECT_GT(ReadJsonFile(seconds), 0.0);
  WriteFileAtomic(seconds, "1000");
  run.stop_after = 0;
  run.time_limit = 999;
  train();
  const Json extra = ReadJsonFile(run.out / "config.json")["extra"];
  EXPECT_GT(extra["training_seconds"], 1000.0);
  EXPECT_EQ(ReadJsonFile(run.out / "results.json")["steps"], 3) << "no time was left";
}

TEST_F(KindSeconds, ARunThatItsTimeHadEndedTakesNoMoreSteps) {
  job_.kind_seconds = 1e-6;
  const fs::path results = Run(0).out / "results.json";
  // Where a folder lies no file can be written: as if the process died there.
  fs::create_directories(results / "in-the-way");
  EXPECT_ANY_THROW(Make());
  fs::remove_all(results);
  Make();
  EXPECT_EQ(ResultsOf(1)["steps"], 1);
}

Json Results(uint64_t seed, double top1) {
  return {{"kind", "hidden"},
          {"seed", seed},
          {"parameters", 100},
          {"validation", {{"loss", 1.0}}},
          {"scores",
           {{{"phase", "decoder"},
             {"layer", 0},
             {"lead", 1},
             {"top1", top1},
             {"top4", 0.9},
             {"cross_entropy", 1.5},
             {"ece", 0.02},
             {"ci95", {top1 - 0.01, top1 + 0.02}}}}}};
}

TEST(LeaderboardTest, SeedsAreAveragedAndIntervalsCoverThem) {
  const Json row =
      LeaderboardRow("hidden", {Results(1, .5), Results(2, .6)}, 200, 20000, 4);
  EXPECT_NEAR(row["scores"][0]["top1"].get<double>(), .55, 1e-9);
  EXPECT_NEAR(row["scores"][0]["ci95"][0].get<double>(), .49, 1e-9);
  EXPECT_NEAR(row["scores"][0]["ci95"][1].get<double>(), .62, 1e-9);
  EXPECT_NEAR(row["decoder_next_top1"].get<double>(), .55, 1e-9);
  EXPECT_TRUE(row["encoder_next_top1"].is_null());
  EXPECT_FALSE(row["offline_only"].get<bool>());  // 4 x 200 us of 20 ms are 4 %
}

TEST(LeaderboardTest, SlowKindsAreOfflineOnly) {
  const auto offline = [](double us, double pass) {
    return LeaderboardRow("x", {Results(1, .5)}, us, pass, 4)["offline_only"];
  };
  EXPECT_TRUE(offline(251, 20000).get<bool>());
  EXPECT_FALSE(offline(249, 20000).get<bool>());
  EXPECT_TRUE(offline(251, 0).is_null());  // the pass is not known
}

}  // namespace
}  // namespace routecast
