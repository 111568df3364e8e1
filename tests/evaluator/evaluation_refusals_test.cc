// What an evaluation refuses, when, and what it leaves then.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <functional>
#include <limits>

#include "common/errors.h"
#include "evaluator/evaluation_setup.h"
#include "evaluator/predictor_set.h"
#include "models/predictor_factory.h"
#include "tests/evaluator/evaluation_fixture.h"

namespace routecast {
namespace {

class EvaluationRefusals : public EvaluationTest {};

TEST_F(EvaluationRefusals, AGpuTierWithoutADeviceIsTheEnvironment) {
  EvaluationOptions options = Options();
  for (const char* tier : {"gpu:1GiB,host,disk", "gpu:1GiB,disk"}) {
    options.tier = tier;
    if (!at::hasCUDA()) {
      EXPECT_THROW(ValidateEvaluation(options), EnvironmentError);
    }
  }
  options.tier = "gpu:1GiB,host";
  EXPECT_THROW(ValidateEvaluation(options), UsageError);
}

TEST_F(EvaluationRefusals, BatchesAreAListOfSizes) {
  EXPECT_EQ(ParseBatches("1,4,16,32"), (std::vector<int>{1, 4, 16, 32}));
  for (const char* wrong : {"0", "-1", "4x", "1,,2", "1000000", " 4"}) {
    EXPECT_THROW(ParseBatches(wrong), UsageError) << wrong;
  }
}

TEST_F(EvaluationRefusals, OptionsThatDoNotFitTogetherAreUsage) {
  EvaluationOptions options = Options();
  options.schedules = {"by_rote"};
  EXPECT_THROW(ValidateEvaluation(options), UsageError);
  options = Options();
  options.batches = {1, 2};
  options.timeline = true;
  options.out = folder_ / "no";
  EXPECT_THROW(ValidateEvaluation(options), UsageError);
  options = Options();
  options.store.clear();
  options.model = folder_ / "model";
  options.prompts = {"x"};
  options.schedules = {"by_route"};  // routes are foretold from a store's counts
  EXPECT_THROW(ValidateEvaluation(options), UsageError);
  options = Options();
  options.prompts = {"x"};  // a replay reads none
  EXPECT_THROW(ValidateEvaluation(options), UsageError);
  options = Options();
  options.compare = false;
  options.baselines = "simple";
  EXPECT_THROW(ValidateEvaluation(options), UsageError);
  options = Options();
  options.report_with = {"elsewhere"};  // there is no --out
  EXPECT_THROW(ValidateEvaluation(options), UsageError);
  options = Options();
  options.model = folder_ / "model";
  ValidateEvaluation(options);
  options.phase = "both";  // generation always runs both
  EXPECT_THROW(ValidateEvaluation(options), UsageError);
  options = Options();
  options.budgets = {"25%", "a third"};
  EXPECT_THROW(ValidateEvaluation(options), UsageError);
  options.budgets = {"25%", "50%"};
  options.tier = "host:1MiB,disk";  // one budget
  EXPECT_THROW(ValidateEvaluation(options), UsageError);
  options.tier.clear();
  options.budgets.clear();
  EXPECT_THROW(ValidateEvaluation(options), UsageError);
}

// Each would otherwise do nothing, or something else, without a word.
TEST_F(EvaluationRefusals, WhatWouldNotBeHeededIsRefusedInThreeLines) {
  const auto words_of = [&](const std::function<void(EvaluationOptions*)>& change) {
    EvaluationOptions options = Options();
    change(&options);
    try {
      ValidateEvaluation(options);
    } catch (const UsageError& e) {
      const std::string words = e.what();
      EXPECT_EQ(std::count(words.begin(), words.end(), '\n'), 2) << words;
      return words;
    }
    return std::string("nothing was refused");
  };
  const auto expect = [](const std::string& words, const std::string& part) {
    EXPECT_NE(words.find(part), words.npos) << words;
  };
  using O = EvaluationOptions*;
  for (const char* link : {"native", "emulated"}) {
    expect(words_of([&](O o) { o->profile = "rtx3090", o->link = link; }),
           std::string("--link=") + link);
  }
  expect(words_of([](O o) { o->batches = {4, 4}; }), "--batch names one twice");
  expect(words_of([](O o) { o->budgets = {"25%", "50%", "25%"}; }), "25%");
  expect(words_of([](O o) {
           o->batches = {2}, o->schedules = {"by_route", "by_route"};
         }),
         "--schedule names one twice");
  expect(words_of([](O o) {
           o->schedules = {"in_order", "by_route"};
         }),
         "batches of one hold nothing to group");
  expect(words_of([](O o) { o->policies = {"on_demand"}, o->predictor = {"markov"}; }),
         "--policy=on_demand asks nobody");
  expect(words_of([](O o) { o->eviction = "lru,lfu"; }), "--mode=simulate takes lists");
  expect(words_of([](O o) { o->eviction = "belady"; }), "--mode=simulate has a row");
  expect(words_of([](O o) { o->eviction = "lruu"; }), "did you mean lru?");
  expect(words_of([](O o) { o->rounds = std::numeric_limits<int>::max(); }),
         "--rounds=2147483647 is out of bounds");
  expect(words_of([](O o) { o->max_new_tokens = 0; }), "--max_new_tokens=0");
  EvaluationOptions one = Options();
  one.schedules = {"by_route"};  // that alone was asked for
  one.policies = {"on_demand", "auto"};
  one.predictor = {"markov"};
  EXPECT_NO_THROW(ValidateEvaluation(one));
}

TEST_F(EvaluationRefusals, AnEvictionThatCannotBeServedIsNotOffered) {
  try {
    ServedEviction("beladi");
    FAIL();
  } catch (const UsageError& e) {
    const std::string words = e.what();
    EXPECT_NE(words.find("phase_aware"), words.npos) << words;
    EXPECT_EQ(words.find("belady"), words.npos) << words;
  }
}

// A page has its limit; an hour's results must not end as a defect for it.
TEST_F(EvaluationRefusals, APageThatIsTooLargeLeavesTheResults) {
  const fs::path large = folder_ / "large";
  fs::create_directories(large);
  Json row = {{"policy", "auto"},       {"predictor", std::string(100, 'x')},
              {"phase", "decoder"},     {"eviction", "lru"},
              {"tokens_per_second", 1}, {"speed_up", 1}};
  Json results = {{"device", "cpu"}, {"rows", Json::array()}};
  for (int i = 0; i < 20'000; ++i) results["rows"].push_back(row);
  WriteFileAtomic(large / "results.json", results.dump());
  EvaluationOptions options = Options();
  options.compare = false;
  options.out = folder_ / "beside-large";
  options.report_with = {large};
  testing::internal::CaptureStderr();
  Evaluate(options, Json::object());
  EXPECT_NE(testing::internal::GetCapturedStderr().find("report.html is left out"),
            std::string::npos);
  EXPECT_TRUE(fs::exists(options.out / "results.json"));
  EXPECT_EQ(ReadJsonFile(options.out / "run.json")["exit_status"], kExitDone);
}

TEST_F(EvaluationRefusals, TooSmallABudgetIsRefused) {
  EvaluationOptions options = Options();
  options.budgets = {"3%"};
  EXPECT_THROW(Evaluate(options, Json::object()), UsageError);
}

TEST_F(EvaluationRefusals, NothingToDoIsUsage) {
  EvaluationOptions options;
  EXPECT_THROW(ValidateEvaluation(options), UsageError);
  options.model = folder_ / "model";
  EXPECT_THROW(ValidateEvaluation(options), UsageError);  // no prompts
  options = Options();
  options.eviction = "belady";
  EXPECT_THROW(ValidateEvaluation(options), UsageError);
}

TEST_F(EvaluationRefusals, AWarmStartThatCannotBeCountedIsUsage) {
  SwitchConfig other = SmallConfig();
  other.num_experts *= 2;
  WriteSyntheticStore(folder_ / "wider", other);
  const MoeGeometry g = SmallConfig().geometry();
  EXPECT_EQ(WarmStartOf("none", nullptr, g), nullptr);
  for (const std::string& wrong : {std::string("auto"), (folder_ / "nowhere").string(),
                                   (folder_ / "wider").string()}) {
    try {
      WarmStartOf(wrong, nullptr, g);
      FAIL() << wrong;
    } catch (const UsageError& e) {
      const std::string words = e.what();
      EXPECT_LE(std::count(words.begin(), words.end(), '\n'), 2) << words;
    }
  }
}

TEST_F(EvaluationRefusals, ATooSmallBudgetIsRefusedBeforeAnythingIsWritten) {
  EvaluationOptions options = Options();
  options.cache = folder_ / "untouched";
  options.budgets = {"50%", "1KiB"};
  for (const fs::path& model : {fs::path(), folder_ / "model"}) {  // a replay, generation
    options.model = model;
    for (const bool dry : {true, false}) {
      options.dry_run = dry;
      EXPECT_THROW(Evaluate(options, Json::object()), UsageError);
      EXPECT_FALSE(fs::exists(options.cache));
    }
  }
  options.budgets = {"50%"};
  options.dry_run = true;
  testing::internal::CaptureStdout();
  Evaluate(options, Json::object());
  const std::string plan = testing::internal::GetCapturedStdout();
  const std::string all = std::to_string(SmallConfig().geometry().num_keys());
  EXPECT_NE(plan.find("this budget holds "), plan.npos) << plan;
  EXPECT_NE(plan.find(" of " + all + " experts"), plan.npos) << plan;
}

// run.json says how a run ended, and no results of an earlier run stand beside it.
TEST_F(EvaluationRefusals, AFailedRunSaysHowItEnded) {
  EvaluationOptions options = Options();
  options.compare = false;
  options.cache = folder_ / "damaged-cache";
  options.out = folder_ / "failed";
  Evaluate(options, Json::object());
  ASSERT_TRUE(fs::exists(options.out / "results.json"));
  for (const auto& entry : fs::directory_iterator(options.cache)) {
    std::fstream file(entry.path(), std::ios::in | std::ios::out | std::ios::binary);
    for (int page = 1; page < 10; ++page) file.seekp(4096 * page + 100).put('\x5a');
  }
  try {
    Evaluate(options, Json::object());
    ADD_FAILURE() << "a damaged expert was taken";
  } catch (const EnvironmentError& e) {
    const std::string words = e.what();
    EXPECT_LE(std::count(words.begin(), words.end(), '\n'), 2) << words;
    EXPECT_NE(words.find("checksum differs"), words.npos) << words;
    EXPECT_NE(words.find("remove the expert file"), words.npos) << words;
  }
  const Json run = ReadJsonFile(options.out / "run.json");
  EXPECT_EQ(run["exit_status"], kExitEnvironment);
  EXPECT_FALSE(run["end"].is_null());
  for (const char* file : {"results.json", "rows.csv", "table.txt", "report.html"})
    EXPECT_FALSE(fs::exists(options.out / file)) << file;
}

TEST_F(EvaluationRefusals, AnUnknownPredictorIsUsage) {
  EvaluationOptions options = Options();
  options.predictor = {"frequencies"};
  EXPECT_THROW(Evaluate(options, Json::object()), UsageError);
}

TEST_F(EvaluationRefusals, AWrongNameNamesTheNearest) {
  const auto words_of = [](const std::function<void()>& wrong) -> std::string {
    try {
      wrong();
    } catch (const UsageError& e) {
      return e.what();
    }
    return "nothing was refused";
  };
  const auto predictor = [&](const std::string& name) {
    return words_of([&] { WithBaselines({name}, "none"); });
  };
  EXPECT_NE(predictor("orcale").find("did you mean oracle?"), std::string::npos);
  EXPECT_NE(predictor("nonee").find("did you mean none?"), std::string::npos);
  EXPECT_NE(predictor("token_pattern").find("did you mean token_patterns?"),
            std::string::npos);
  fs::create_directories(folder_ / "runs" / "hidden-7");
  WriteFileAtomic(folder_ / "runs" / "hidden-7" / "config.json", "{}");
  const fs::path before = fs::current_path();
  fs::current_path(folder_ / "runs");
  EXPECT_NE(predictor("hiden-7").find("did you mean hidden-7?"), std::string::npos);
  fs::current_path(before);
  const std::string wrong = (folder_ / "runs" / "hiden-7").string();
  const std::string words =
      words_of([&] { LoadPredictor(wrong, SmallConfig().geometry(), "", {}); });
  EXPECT_NE(words.find("did you mean " + (folder_ / "runs" / "hidden-7").string()),
            std::string::npos)
      << words;
  EXPECT_NE(words_of([] { ParsePolicies({"al"}); }).find("did you mean all?"),
            std::string::npos);
}

}  // namespace
}  // namespace routecast
