// What a foresight says reaches the runtime: at a pass' end, while it is off, all of it.
#include <gtest/gtest.h>

#include <chrono>
#include <future>
#include <thread>

#include "tests/evaluator/prefetch_runtime_fixture.h"

namespace routecast {
namespace {

class RuntimeForesightTest : public PrefetchRuntimeTest {};

INSTANTIATE_TEST_SUITE_P(Growing, RuntimeForesightTest,
                         testing::Values(StepMemory::kByDevice));
INSTANTIATE_TEST_SUITE_P(Fixed, RuntimeForesightTest,
                         testing::Values(StepMemory::kFixed));

// Says at a pass' end what the next token's first layer needs, and nothing else.
class EndForesight : public Foresight {
 public:
  EndForesight(const MoeGeometry& geometry, std::vector<OracleForesight::Visit> visits)
      : geometry_(geometry), visits_(std::move(visits)) {}
  std::string name() const override { return "end"; }
  std::vector<LayerForecast> AtPassBegin(const PassInfo&) override { return {}; }
  std::vector<LayerForecast> AtLayer(const LayerRouting&) override {
    ++next_;
    return {};
  }
  std::vector<LayerForecast> AtPassEnd(const PassInfo& pass) override {
    if (pass.stack != Stack::kDecoder || next_ >= visits_.size()) return {};
    EXPECT_TRUE(pass.output_BTD.defined());
    LayerForecast forecast{visits_[next_].layer, 1,
                           std::vector<float>(size_t(geometry_.num_experts), 0.f)};
    for (const int e : visits_[next_].experts) forecast.probabilities[size_t(e)] = 1;
    return {forecast};
  }
  void SkipPass(const PassInfo&) override {}
  void Skip(const LayerRouting&) override { ++next_; }

 private:
  MoeGeometry geometry_;
  std::vector<OracleForesight::Visit> visits_;
  size_t next_ = 0;
};

TEST_P(RuntimeForesightTest, WhatIsSaidAtAPassEndIsFetchedForTheNextToken) {
  DiskTransferEngine engine(file_, 6, {});
  auto first = Runtime(&engine, 6, Eviction::kLru, "on_demand", nullptr);
  const std::string expected = Decode(first.get(), first.get());
  const auto visits = first->TakeVisits();
  first.reset();
  for (const bool aside : {false, true}) {
    ask_aside_ = aside;
    PhaseStats stats;
    // On a thread of its own a busy machine may answer too late for every token.
    for (int tries = aside ? 20 : 1; tries > 0 && stats.speculations == 0; --tries) {
      auto second =
          Runtime(&engine, 6, Eviction::kLru, "top_k",
                  std::make_unique<EndForesight>(checkpoint_.config.geometry(), visits));
      EXPECT_EQ(Decode(second.get(), second.get()), expected);
      second->Suspend();
      stats = second->stats(Stack::kDecoder);
    }
    EXPECT_GT(stats.speculations, 0) << aside;
    EXPECT_GT(stats.predictor_seconds, 0);
    EXPECT_EQ(stats.aside_seconds > 0, aside) << "what another core does for it";
  }
}

// Costs more than it could ever save, and counts what it is told.
class CountingForesight : public Foresight {
 public:
  explicit CountingForesight(int* told) : told_(told) {}
  std::string name() const override { return "counting"; }
  std::vector<LayerForecast> AtPassBegin(const PassInfo&) override { return Slowly(); }
  std::vector<LayerForecast> AtLayer(const LayerRouting&) override { return Slowly(); }
  void SkipPass(const PassInfo&) override { ++*told_; }
  void Skip(const LayerRouting&) override { ++*told_; }

 private:
  std::vector<LayerForecast> Slowly() {
    ++*told_;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    return {};
  }
  int* told_;
};

TEST_P(RuntimeForesightTest, APredictorThatIsOffIsToldNothingUntilTheNextTrial) {
  DiskTransferEngine engine(file_, 32, {});
  RuntimeOptions options;
  options.num_slots = 32;  // after the first sequence nothing is waited for
  options.planner.policy = ParsePolicy("auto");
  // Trials of four steps, clear or not; 20 steps until the second.
  options.gauge = {2, 1, 20, 20, 0};
  int told = 0;
  PrefetchRuntime runtime(file_->spec(), &engine,
                          std::make_unique<CountingForesight>(&told), options);
  for (int i = 0; i < 4; ++i) Decode(&runtime, &runtime);  // the encoder's trial, too
  ASSERT_GT(told, 0);
  ASSERT_FALSE(runtime.speculation_helps(Stack::kEncoder));
  ASSERT_FALSE(runtime.speculation_helps(Stack::kDecoder));
  const auto tells = [&] {
    const int before = told;
    EXPECT_EQ(Decode(&runtime, &runtime), Resident());
    return told > before;
  };
  std::vector<bool> told_in;
  for (int i = 0; i < 6; ++i) told_in.push_back(tells());
  EXPECT_NE(std::find(told_in.begin(), told_in.end(), false), told_in.end());
  EXPECT_NE(std::find(told_in.begin(), told_in.end(), true), told_in.end());
}

TEST_P(RuntimeForesightTest, ARowThatIsOffMovesWhatOnDemandMoves) {
  DiskTransferEngine engine(file_, 6, {});
  RuntimeOptions options;
  options.num_slots = 6;
  options.gauge = {2, 1, 100'000, 100'000, 0};  // one trial, of four steps
  const auto moved = [&](const char* policy, std::unique_ptr<Foresight> foresight) {
    options.planner.policy = ParsePolicy(policy);
    PrefetchRuntime runtime(file_->spec(), &engine, std::move(foresight), options);
    for (int i = 0; i < 5; ++i) Decode(&runtime, &runtime);  // the encoder's trial, too
    EXPECT_EQ(runtime.speculation_helps(Stack::kDecoder), policy != std::string("auto"));
    runtime.ResetStats();
    Decode(&runtime, &runtime);
    const PhaseStats stats = runtime.stats(Stack::kDecoder);
    EXPECT_EQ(stats.speculations, 0);
    EXPECT_EQ(stats.predictor_seconds + stats.aside_seconds, 0) << "it is not asked";
    return std::tuple(stats.uses, stats.hits, stats.bytes_useful);
  };
  int told = 0;
  EXPECT_EQ(moved("auto", std::make_unique<CountingForesight>(&told)),
            moved("on_demand", nullptr));
  EXPECT_GT(told, 0);
}

TEST_P(RuntimeForesightTest, OracleHitsWhatItForesees) {
  DiskTransferEngine engine(file_, 16, {});
  auto first = Runtime(&engine, 16, Eviction::kLru, "on_demand", nullptr);
  const std::string expected = Decode(first.get(), first.get());
  auto oracle = std::make_unique<OracleForesight>(checkpoint_.config.geometry(), 8);
  oracle->SetFuture(first->TakeVisits());
  first.reset();
  auto second = Runtime(&engine, 16, Eviction::kLru, "top_k", std::move(oracle));
  EXPECT_EQ(Decode(second.get(), second.get()), expected);
  const PhaseStats& stats = second->stats(Stack::kDecoder);
  EXPECT_GT(stats.speculations_used, 0);
  EXPECT_LE(stats.hits, stats.uses);
}

// Its first answer comes when everything is over.
class LateForesight : public Foresight {
 public:
  LateForesight(std::shared_future<void> over, int* asked, int* told)
      : over_(std::move(over)), asked_(asked), told_(told) {}
  std::string name() const override { return "late"; }
  std::vector<LayerForecast> AtPassBegin(const PassInfo&) override { return Late(); }
  std::vector<LayerForecast> AtLayer(const LayerRouting&) override { return Late(); }
  std::vector<LayerForecast> AtPassEnd(const PassInfo&) override { return Late(); }
  void SkipPass(const PassInfo&) override { ++*told_; }
  void Skip(const LayerRouting&) override { ++*told_; }

 private:
  std::vector<LayerForecast> Late() {
    ++*asked_;
    over_.wait();
    return {};
  }
  std::shared_future<void> over_;
  int *asked_, *told_;
};

// Else they would pile up, each with its windows, and be answered when nobody waits.
TEST_P(RuntimeForesightTest, WhoAnswersTooLateIsAskedTheNewestQuestionAlone) {
  DiskTransferEngine engine(file_, 6, {});
  ask_aside_ = true;
  std::promise<void> over;
  int asked = 0, told = 0;
  auto runtime =
      Runtime(&engine, 6, Eviction::kLru, "top_k",
              std::make_unique<LateForesight>(over.get_future().share(), &asked, &told));
  EXPECT_EQ(Decode(runtime.get(), runtime.get()), Resident());
  over.set_value();
  const size_t visits = runtime->TakeVisits().size();
  runtime->Suspend();
  // The first one at the encoder's begin, and at the end of the last pass.
  EXPECT_LE(asked, 2);
  EXPECT_GE(static_cast<size_t>(told), visits) << "the history stays whole";
}

}  // namespace
}  // namespace routecast
