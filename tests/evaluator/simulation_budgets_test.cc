// Several budgets in one simulation: each as if played alone, and what a run leaves.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <memory>

#include "common/errors.h"
#include "evaluator/policy_simulation.h"
#include "evaluator/predictor_set.h"
#include "report/evaluation_report.h"
#include "tests/evaluator/synthetic_store.h"
#include "tests/models/switch_test_support.h"

namespace routecast {
namespace {

using testing::HasSubstr;
using testing::Not;

// Counts the questions to the one that it stands for.
class CountingPredictor : public ExpertPredictor {
 public:
  CountingPredictor(std::unique_ptr<ExpertPredictor> inner, int64_t* questions)
      : inner_(std::move(inner)), questions_(questions) {}
  std::string name() const override { return inner_->name(); }
  bool needs_hidden() const override { return inner_->needs_hidden(); }
  int history_tokens() const override { return inner_->history_tokens(); }
  std::optional<at::Tensor> Predict(const RoutingWindow& window, int lead) override {
    ++*questions_;
    return inner_->Predict(window, lead);
  }

 private:
  std::unique_ptr<ExpertPredictor> inner_;
  int64_t* questions_;
};

class SimulationBudgetsTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = fs::temp_directory_path() /
              ("simulation_budgets_test." + std::to_string(::getpid()));
    WriteSyntheticStore(folder_ / "store", SmallConfig());
    reader_ = std::make_unique<TraceReader>(folder_ / "store");
  }
  static void TearDownTestSuite() {
    reader_.reset();
    fs::remove_all(folder_);
  }
  static DeviceProfile Profile() {
    DeviceProfile profile;
    profile.name = "made_up";
    profile.link_bytes_per_second = 2e9;
    profile.memory_bytes_per_second = 10e9;
    return profile;
  }
  static std::vector<std::unique_ptr<ExpertPredictor>> Predictors(
      const std::vector<std::string>& names) {
    return MakePredictors(names, names, reader_->config().geometry, {}, reader_.get(),
                          true);
  }
  PolicySimulationResult Simulate(std::vector<double> shares,
                                  std::vector<std::string> policies = {"auto"}) {
    auto markov = Predictors({"markov"});
    std::vector<std::unique_ptr<ExpertPredictor>> predictors;
    predictors.push_back(
        std::make_unique<CountingPredictor>(std::move(markov[0]), &questions_));
    PolicySimulationOptions options;
    options.policies = std::move(policies);
    options.evictions = {"lru", "lfu"};
    options.budget_shares = std::move(shares);
    return SimulatePolicies(*reader_, predictors, Profile(), options);
  }
  // simulation.json and report.html of a run.
  std::string Report(const PolicySimulationResult& result) {
    fs::create_directories(folder_ / "run");
    WriteFileAtomic(folder_ / "run" / "simulation.json", result.ToJson().dump());
    WriteEvaluationReport(folder_ / "run" / "report.html", {folder_ / "run"});
    return ReadFile(folder_ / "run" / "report.html", 1 << 20);
  }
  int64_t questions_ = 0;
  static inline fs::path folder_;
  static inline std::unique_ptr<TraceReader> reader_;
};

TEST_F(SimulationBudgetsTest, EachIsPlayedAsIfAlone) {
  const std::vector<double> shares = {0.5, 0.25, 0.75};
  Json together = Simulate(shares).ToJson()["rows"];
  Json alone = Json::array();
  for (const double share : shares) {
    const Json json = Simulate({share}).ToJson();
    for (const Json& row : json["rows"]) alone.push_back(row);
  }
  for (size_t i = 0; i < together.size(); ++i) {
    const size_t budget = i / (together.size() / shares.size());
    EXPECT_EQ(together[i]["budget"], std::to_string(int(100 * shares[budget])) + "%");
    together[i].erase("budget");
  }
  EXPECT_EQ(together, alone);
}

TEST_F(SimulationBudgetsTest, APredictorIsAskedOnceForAll) {
  Simulate({0.25});
  const int64_t once = std::exchange(questions_, 0);
  ASSERT_GT(once, 0);
  Simulate({0.25, 0.5, 0.75});
  EXPECT_EQ(std::exchange(questions_, 0), once);
  Simulate({0.25}, {"auto", "confident"});  // both look four visits ahead
  EXPECT_EQ(questions_, once);
}

// Who counts while it serves must not know the sequences from another policy's row.
TEST_F(SimulationBudgetsTest, APolicysRowsAreTheSameBesideAnothers) {
  const auto rows_of = [&](const std::vector<std::string>& policies) {
    PolicySimulationOptions options;
    options.policies = policies;
    Json rows = Json::array();
    for (const SimulatedRow& row :
         SimulatePolicies(*reader_, Predictors({"token_patterns", "mixed_scores"}),
                          Profile(), options)
             .rows) {
      if (row.policy == "top_k") rows.push_back(row.ToJson());
    }
    return rows;
  };
  const Json alone = rows_of({"top_k"});
  ASSERT_EQ(alone.size(), 2u);
  EXPECT_EQ(rows_of({"confident", "top_k"}), alone);
}

TEST_F(SimulationBudgetsTest, AModelOfGivenSizesIsPlayed) {
  PolicySimulationOptions options;
  const auto first = [&] {
    return SimulatePolicies(*reader_, {}, Profile(), options).rows[0];
  };
  const SimulatedRow base = first();
  options.sizes.expert_bytes = 13'200'000;
  options.sizes.layer_seconds = 120e-6;
  options.sizes.head_seconds = 0;
  const SimulatedRow given = first();
  EXPECT_EQ(given.slots, base.slots) << "a share is of the experts";
  EXPECT_EQ(given.budget_bytes, static_cast<uint64_t>(given.slots) * 13'200'000);
  EXPECT_EQ(given.hit_rate, base.hit_rate);
  // A step of one token: each layer, and one expert read once from memory.
  const MoeGeometry g = reader_->config().geometry;
  const auto result = SimulatePolicies(*reader_, {}, Profile(), options);
  EXPECT_NEAR(
      result.rows.back().seconds,
      static_cast<double>(result.tokens) * g.decoder_layers * (120e-6 + 13.2e6 / 10e9),
      1e-9);
  options.sizes.expert_seconds = 50e-6;
  const auto faster = SimulatePolicies(*reader_, {}, Profile(), options);
  EXPECT_NEAR(faster.rows.back().seconds,
              static_cast<double>(faster.tokens) * g.decoder_layers * 170e-6, 1e-9);
}

TEST_F(SimulationBudgetsTest, EachRowSaysWhatItsModelIsFrom) {
  PolicySimulationOptions options;
  options.sizes.expert_bytes = 13'200'000;
  options.sizes.layer_seconds = 120e-6;
  const auto result = SimulatePolicies(*reader_, {}, Profile(), options);
  const Json json = result.ToJson();
  EXPECT_EQ(json["imagined"]["expert_bytes"]["from"], "--expert_bytes");
  EXPECT_EQ(json["imagined"]["layer_us"]["from"], "--layer_us");
  EXPECT_EQ(json["imagined"]["expert_us"]["from"],
            "--expert_bytes, read once at 10 GB/s");
  EXPECT_EQ(json["imagined"]["head_us"]["from"],
            "switch-base's sizes, fp32, read once at 10 GB/s");
  for (const Json& row : json["rows"]) {
    EXPECT_EQ(row["expert_bytes"], 13.2e6);
    EXPECT_NEAR(row["layer_us"].get<double>(), 120, 1e-9);
    EXPECT_NEAR(row["expert_us"].get<double>(), 1320, 1e-6);
    EXPECT_THAT(row["imagined_from"].get<std::string>(),
                HasSubstr("layer_us: --layer_us; expert_us: --expert_bytes, read once"));
  }
  EXPECT_THAT(PolicyTable(result), HasSubstr("a layer without experts 120.0 us"));
}

TEST_F(SimulationBudgetsTest, ABudgetMayBeBytesOfTheImaginedModel) {
  ImaginedSizes sizes;
  sizes.expert_bytes = 1000;
  const ImaginedModel model = Imagine(sizes, {}, Profile());
  EXPECT_EQ(SharesOfBudgets({"25%", "29%", "50000", "1MiB"}, 100, model),
            (std::vector<double>{0.25, 0.29, 0.5, 1}));
  EXPECT_THROW(SharesOfBudgets({"50%", "50000"}, 100, model), UsageError);
  EXPECT_THROW(SharesOfBudgets({}, 100, model), UsageError);
  EXPECT_THROW(SharesOfBudgets({"101%"}, 100, model), UsageError);
}

// Before anything of an earlier run goes.
TEST_F(SimulationBudgetsTest, WhatCannotBePlayedIsKnownWithoutPlaying) {
  PolicySimulationOptions options;
  CheckSimulation(*reader_, {}, options);
  options.budget_shares = {0.001};
  EXPECT_THROW(CheckSimulation(*reader_, {}, options), UsageError);
  options.budget_shares = {0.5};
  options.warmup_sequences = 1000;
  EXPECT_THROW(CheckSimulation(*reader_, {}, options), UsageError);
}

TEST_F(SimulationBudgetsTest, EverythingInMemoryWaitsForNothing) {
  const auto rows = Simulate({0.25, 0.5}).rows;
  const MoeGeometry g = reader_->config().geometry;
  for (const SimulatedRow& row : rows) {
    if (row.policy != "resident") continue;
    EXPECT_EQ(row.slots, g.decoder_layers * g.num_experts);
    EXPECT_EQ(row.bytes_useful + row.bytes_late + row.bytes_wasted, 0u);
    EXPECT_EQ(row.stall_seconds, 0);
    const SimulatedRow& lru = row.budget == "25%" ? rows[0] : rows[rows.size() / 2];
    EXPECT_NEAR(row.seconds, lru.seconds - lru.stall_seconds, 1e-9 * lru.seconds);
    EXPECT_NEAR(row.speed_up, lru.seconds / row.seconds, 1e-12);
  }
}

TEST_F(SimulationBudgetsTest, RowsAreLinesOfTheCsv) {
  const auto result = Simulate({0.25, 0.5});
  const std::string csv = result.ToCsv();
  EXPECT_EQ(static_cast<size_t>(std::count(csv.begin(), csv.end(), '\n')),
            result.rows.size() + 1);
  EXPECT_THAT(csv, HasSubstr("speed_up"));
  EXPECT_THAT(csv, HasSubstr("50%"));
}

TEST_F(SimulationBudgetsTest, AReportDrawsSeveralAgainstMemory) {
  const std::string page = Report(Simulate({0.25, 0.5}));
  EXPECT_THAT(page, HasSubstr("Simulated on the profile made_up"));
  EXPECT_THAT(page, HasSubstr("Simulated rate over on-demand LRU by memory"));
  EXPECT_THAT(page, HasSubstr("25% of the experts: "));
  EXPECT_THAT(page, HasSubstr("Figures of the imagined model: expert_bytes: switch"));
  EXPECT_THAT(page, HasSubstr("simulated, 50%: markov"));
  EXPECT_THAT(page, HasSubstr("markov, lfu"));
}

TEST_F(SimulationBudgetsTest, AReportOfOneBudgetHasABarEach) {
  const std::string page = Report(Simulate({0.25}));
  EXPECT_THAT(page, HasSubstr("Simulated rate over on-demand LRU<"));
  EXPECT_THAT(page, HasSubstr("What was moved"));
  EXPECT_THAT(page, Not(HasSubstr("by memory")));
}

}  // namespace
}  // namespace routecast
