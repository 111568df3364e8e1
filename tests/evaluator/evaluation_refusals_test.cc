// What an evaluation refuses, when, and what it leaves then.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>

#include "common/errors.h"
#include "evaluator/evaluation_setup.h"
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

}  // namespace
}  // namespace routecast
