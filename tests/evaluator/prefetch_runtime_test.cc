// Whatever is predicted, and however small the budget: the same bits come out, of decoder
// steps in memory that grows and in fixed memory.
#include "evaluator/prefetch_runtime.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <set>
#include <thread>

#include "common/errors.h"
#include "common/random.h"
#include "evaluator/disk_transfer_engine.h"
#include "evaluator/expert_store.h"
#include "evaluator/expert_tiers.h"
#include "evaluator/output_hash.h"
#include "evaluator/paced_compute.h"
#include "evaluator/workload.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "models/generation.h"
#include "tests/evaluator/fake_device.h"
#include "tests/evaluator/strange_predictor.h"
#include "tests/models/switch_test_support.h"

namespace routecast {
namespace {

class PrefetchRuntimeTest : public testing::TestWithParam<StepMemory> {
 protected:
  void SetUp() override {
    folder_ =
        fs::temp_directory_path() / ("prefetch_runtime." + std::to_string(::getpid()));
    fs::create_directories(folder_ / "model");
    const Checkpoint made = RandomCheckpoint(SmallConfig(), 3);
    SaveCheckpoint(folder_ / "model", made.config, made.parameters, at::kFloat);
    checkpoint_ =
        LoadCheckpoint(folder_ / "model", at::kFloat, at::kCPU, ExpertLoading::kLeaveOut);
    file_ = ExpertsOfCheckpoint(folder_ / "cache", folder_ / "model", checkpoint_.config,
                                checkpoint_.fingerprint, at::kFloat, true);
    ids_ = at::randint(2, 96, {2, 11}, at::kLong);
    valid_ = at::ones({2, 11}, at::kBool);
    valid_[1].slice(0, 8) = false;
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::string Decode(ExpertSource* source, RoutingObserver* observer) {
    SourceSwitch rows;  // resident experts by lease, too
    rows.Set(source);
    LocalExpertExecutor executor(&rows);
    SwitchModel model(checkpoint_.config, checkpoint_.parameters, &executor);
    OutputHash hash;
    GenerationOptions options;
    options.max_new_tokens = 8;
    const auto steps = FixedSteps(GetParam(), &model, ids_.size(0), ids_.size(1),
                                  options.max_new_tokens, {});
    EXPECT_EQ(steps != nullptr, GetParam() == StepMemory::kFixed);
    options.steps_in = steps.get();
    options.forward.observer = observer;
    options.on_step = [&](int, const at::Tensor& logits, const at::Tensor& ids) {
      hash.Add(logits);
      hash.Add(ids);
      return true;
    };
    Generate(&model, ids_, valid_, options);
    return hash.Hex();
  }
  std::string Resident() {
    const Checkpoint whole = LoadCheckpoint(folder_ / "model", at::kFloat, at::kCPU);
    ResidentExpertSource source(whole.config.geometry(),
                                ExpertWeightsOf(whole.config, whole.parameters));
    return Decode(&source, nullptr);
  }
  std::unique_ptr<PrefetchRuntime> Runtime(TransferEngine* engine, int slots,
                                           Eviction eviction, const std::string& policy,
                                           std::unique_ptr<Foresight> foresight) {
    RuntimeOptions options;
    options.num_slots = slots;
    options.eviction = eviction;
    options.planner.policy = ParsePolicy(policy);
    options.ask_aside = ask_aside_;
    return std::make_unique<PrefetchRuntime>(file_->spec(), engine, std::move(foresight),
                                             options);
  }
  // Asked on the forward thread, then on one of their own.
  void ChangesNothing(StrangePredictor::Mode mode, const std::string& policy, int slots,
                      Eviction eviction = Eviction::kLru) {
    const std::string resident = Resident();
    for (const bool aside : {false, true}) {
      ask_aside_ = aside;
      DiskTransferEngine engine(file_, slots, {2, 4096, 0, true, true});
      StrangePredictor predictor(mode);
      auto runtime = Runtime(&engine, slots, eviction, policy,
                             std::make_unique<PredictorForesight>(
                                 &predictor, checkpoint_.config.geometry(), 3));
      EXPECT_EQ(Decode(runtime.get(), runtime.get()), resident) << aside;
      // What is used how often is known now: a phase-aware cache is warmed.
      EXPECT_EQ(Decode(runtime.get(), runtime.get()), resident) << aside;
      runtime->Suspend();
      EXPECT_GT(predictor.calls, 0);
      EXPECT_EQ(runtime->questions().failed() > 0, StrangePredictor::Fails(mode));
      EXPECT_THAT(runtime->questions().first_failure(),
                  testing::StartsWith(StrangePredictor::FailureOf(mode)));
      if (!StrangePredictor::Answers(mode)) {  // nobody acts on any of it
        for (const Stack stack : {Stack::kEncoder, Stack::kDecoder})
          EXPECT_EQ(runtime->stats(stack).speculations, 0);
      }
    }
  }

  bool ask_aside_ = false;
  fs::path folder_;
  Checkpoint checkpoint_;
  std::shared_ptr<const ExpertFile> file_;
  at::Tensor ids_, valid_;
};

INSTANTIATE_TEST_SUITE_P(Growing, PrefetchRuntimeTest,
                         testing::Values(StepMemory::kByDevice));
INSTANTIATE_TEST_SUITE_P(Fixed, PrefetchRuntimeTest, testing::Values(StepMemory::kFixed));

TEST_P(PrefetchRuntimeTest, ExpertsWithAGateAreRefused) {
  SwitchConfig gated = checkpoint_.config;
  gated.is_gated_act = true;
  EXPECT_THROW(ExpertsOfCheckpoint(folder_ / "cache", folder_ / "model", gated,
                                   checkpoint_.fingerprint, at::kFloat, true),
               UsageError);
}

TEST_P(PrefetchRuntimeTest, EveryEvictionGivesTheResidentBits) {
  const std::string expected = Resident();
  for (Eviction eviction :
       {Eviction::kNone, Eviction::kLru, Eviction::kLfu, Eviction::kLfru,
        Eviction::kLeastStale, Eviction::kPhaseAware}) {
    for (int slots : {2, 5, 32}) {
      DiskTransferEngine engine(file_, slots, {});
      auto runtime = Runtime(&engine, slots, eviction, "on_demand", nullptr);
      EXPECT_EQ(Decode(runtime.get(), runtime.get()), expected)
          << EvictionName(eviction) << " " << slots;
      EXPECT_LE(runtime->held_peak_slots(), slots);
    }
  }
}

TEST_P(PrefetchRuntimeTest, AsManyLeasesAsSlotsInServiceWhoeverPassesThemOn) {
  DiskTransferEngine engine(file_, 5, {});
  auto runtime = Runtime(&engine, 5, Eviction::kLru, "on_demand", nullptr);
  SourceSwitch rows;
  rows.Set(runtime.get());
  const SteadyClock clock;
  PacedCompute paced({}, {}, at::kCPU, &clock);
  paced.Set(runtime.get(), runtime.get());
  for (ExpertSource* source :
       std::initializer_list<ExpertSource*>{runtime.get(), &rows, &paced}) {
    ASSERT_EQ(source->LeasesAtOnce(), 5);
    const int experts[] = {0, 1, 3, 5, 7};
    source->Begin(1, experts);
    std::vector<ExpertLease> leases;
    for (int i = 0; i < 5; ++i) leases.push_back(source->Next());
    std::set<const void*> places;
    for (const ExpertLease& lease : leases)
      places.insert(lease.weights().wi_FD.const_data_ptr());
    EXPECT_EQ(places.size(), 5u);
  }
}

TEST_P(PrefetchRuntimeTest, RandomPredictionsChangeNothing) {
  ChangesNothing(StrangePredictor::kRandom, "top_k", 4);
}
TEST_P(PrefetchRuntimeTest, PhaseAwareWarmingChangesNothing) {
  for (const auto mode : {StrangePredictor::kRandom, StrangePredictor::kMalicious}) {
    for (int slots : {2, 5, 24}) {
      ChangesNothing(mode, "top_k", slots, Eviction::kPhaseAware);
    }
  }
}
TEST_P(PrefetchRuntimeTest, MaliciousPredictionsChangeNothing) {
  ChangesNothing(StrangePredictor::kMalicious, "multi_look", 2);
}
TEST_P(PrefetchRuntimeTest, NotANumberChangesNothing) {
  ChangesNothing(StrangePredictor::kNan, "intelligent", 3);
}
TEST_P(PrefetchRuntimeTest, ASlowPredictorChangesNothing) {
  ChangesNothing(StrangePredictor::kSlow, "auto", 3);
}
TEST_P(PrefetchRuntimeTest, APredictorThatThrowsChangesNothing) {
  ChangesNothing(StrangePredictor::kThrowing, "top_k", 3);
}

TEST_P(PrefetchRuntimeTest, WhatIsThrownNeedNotBeAnException) {
  ChangesNothing(StrangePredictor::kThrowingInt, "top_k", 3);
}

TEST_P(PrefetchRuntimeTest, NumbersThatAreNoProbabilitiesChangeNothing) {
  ChangesNothing(StrangePredictor::kTooLikely, "top_k", 3);
}

// Its window is its own: the model's tokens and states are not in it.
TEST_P(PrefetchRuntimeTest, APredictorThatWritesIntoItsWindowChangesNothing) {
  ChangesNothing(StrangePredictor::kWriting, "top_k", 3);
}

TEST_P(PrefetchRuntimeTest, AnswersOfAnotherShapeChangeNothing) {
  ChangesNothing(StrangePredictor::kMisshapen, "top_k", 3);
}

// Budgets, tiers, evictions, policies, predictors, batches, lengths and room that keys
// and values take, as they come.
TEST_P(PrefetchRuntimeTest, RandomSettingsGiveTheResidentBits) {
  const uint64_t slot = file_->spec().stride_bytes();
  const auto count = static_cast<uint64_t>(file_->count());
  const std::string policies[] = {"on_demand",      "multi_look",    "top_k",
                                  "intelligent",    "confident",     "auto",
                                  "adaptive_top_k", "memory_manager"};
  for (uint64_t draw = 0; draw < 60; ++draw) {
    uint64_t asked = 0;
    const auto pick = [&](uint64_t choices) {
      return ToRange(Mix(draw, ++asked, 7), choices);
    };
    at::manual_seed(draw);
    const auto batch = static_cast<int64_t>(1 + pick(5)),
               length = static_cast<int64_t>(1 + pick(12));
    ids_ = at::randint(2, 96, {batch, length}, at::kLong);
    valid_ = at::ones({batch, length}, at::kBool);
    valid_[0].slice(0, 1 + static_cast<int64_t>(pick(static_cast<uint64_t>(length)))) =
        false;
    const uint64_t slots = 2 + pick(count - 1);
    ExpertTierOptions tiers;
    tiers.direct = pick(2) != 0;
    const std::string chains[] = {
        "", "gpu,disk", "gpu,host:" + std::to_string((2 + pick(count)) * slot) + ",disk",
        "managed,disk"};
    const std::string chain = chains[pick(4)];
    tiers.chain = ParseTiers(chain);
    const auto log = std::make_shared<FakeDeviceLog>();
    tiers.open_device = [log] { return std::make_unique<FakeDevice>(log, 1e9); };
    const ExpertTiers opened = OpenTiers(file_, static_cast<int>(slots), tiers);
    RuntimeOptions options;
    options.num_slots = static_cast<int>(slots);
    options.eviction = static_cast<Eviction>(pick(6));  // all but Belady's
    options.planner.policy = ParsePolicy(policies[pick(8)]);
    options.ask_aside = pick(2) != 0;
    if (pick(3) == 0) {
      options.memory_bytes = slots * slot;
      options.key_value_bytes = [=](const PassInfo& pass) {
        return std::min(slots - 2, static_cast<uint64_t>(pass.first_position % 4)) * slot;
      };
    }
    StrangePredictor predictor(
        static_cast<StrangePredictor::Mode>(pick(StrangePredictor::kModes)));
    PrefetchRuntime runtime(file_->spec(), opened.engine.get(),
                            std::make_unique<PredictorForesight>(
                                &predictor, checkpoint_.config.geometry(), 3),
                            options);
    const std::string resident = Resident();
    for (int pass = 0; pass < 2; ++pass) {
      EXPECT_EQ(Decode(&runtime, &runtime), resident)
          << "draw " << draw << ": " << slots << " slots, " << chain << ", "
          << options.planner.policy.name << ", " << EvictionName(options.eviction);
      runtime.Suspend();
      runtime.Resume();
    }
    EXPECT_LE(runtime.held_peak_slots(), static_cast<int>(slots));
    EXPECT_LE(runtime.memory_peak_bytes(), slots * slot);
  }
}

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

TEST_P(PrefetchRuntimeTest, WhatIsSaidAtAPassEndIsFetchedForTheNextToken) {
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

TEST_P(PrefetchRuntimeTest, APredictorThatIsOffIsToldNothingUntilTheNextTrial) {
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

TEST_P(PrefetchRuntimeTest, ARowThatIsOffMovesWhatOnDemandMoves) {
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

TEST_P(PrefetchRuntimeTest, OracleHitsWhatItForesees) {
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

TEST_P(PrefetchRuntimeTest, OneDamagedSlotChangesTheHash) {
  DiskTransferEngine engine(file_, 32, {});
  auto runtime = Runtime(&engine, 32, Eviction::kLru, "on_demand", nullptr);
  const std::string expected = Resident();
  EXPECT_EQ(Decode(runtime.get(), runtime.get()), expected);
  // Every expert that ran is resident now; damage one that the decoder used.
  ExpertKey used{-1, -1};
  for (const auto& visit : runtime->TakeVisits()) used = {visit.layer, visit.experts[0]};
  std::byte* memory = runtime->MemoryOf(used);
  ASSERT_NE(memory, nullptr);
  float* weights = reinterpret_cast<float*>(memory);
  for (int i = 0; i < 64; ++i) weights[i] += 0.5f;
  EXPECT_NE(Decode(runtime.get(), runtime.get()), expected);
}

TEST_P(PrefetchRuntimeTest, SuspendedRowsShareAnEngine) {
  DiskTransferEngine engine(file_, 4, {});
  const std::string expected = Resident();
  auto a = Runtime(&engine, 4, Eviction::kLru, "on_demand", nullptr);
  EXPECT_EQ(Decode(a.get(), a.get()), expected);
  a->Suspend();
  auto b = Runtime(&engine, 4, Eviction::kLfu, "on_demand", nullptr);
  EXPECT_EQ(Decode(b.get(), b.get()), expected);
  b->Suspend();
  a->Resume();
  EXPECT_EQ(Decode(a.get(), a.get()), expected);
}

TEST_P(PrefetchRuntimeTest, PreloadedRowNeverWaits) {
  DiskTransferEngine engine(file_, 32, {});
  auto runtime = Runtime(&engine, 32, Eviction::kLru, "on_demand", nullptr);
  runtime->Suspend();
  std::vector<ExpertKey> all;
  for (int i = 0; i < 32; ++i) {
    all.push_back(ExpertKey::FromIndex(i, checkpoint_.config.geometry()));
  }
  runtime->Preload(all);
  EXPECT_EQ(Decode(runtime.get(), runtime.get()), Resident());
  const PhaseStats& stats = runtime->stats(Stack::kDecoder);
  EXPECT_EQ(stats.hits, stats.uses);
  EXPECT_EQ(stats.stall_seconds, 0);
}

TEST_P(PrefetchRuntimeTest, AWarmStartHitsFromTheFirstStepAndChangesNothing) {
  const MoeGeometry g = checkpoint_.config.geometry();
  std::vector<uint64_t> counts(static_cast<size_t>(g.num_keys()), 0);
  {
    DiskTransferEngine engine(file_, 32, {});
    auto runtime = Runtime(&engine, 32, Eviction::kLru, "on_demand", nullptr);
    Decode(runtime.get(), runtime.get());
    for (const auto& visit : runtime->TakeVisits()) {
      for (const int expert : visit.experts)
        ++counts[static_cast<size_t>(ExpertKey{visit.layer, expert}.Index(g))];
    }
  }
  const UseShares shares = SharesOf(counts, g, "test");
  const auto hits = [&](bool warm) {
    DiskTransferEngine engine(file_, 32, {});
    auto runtime = Runtime(&engine, 32, Eviction::kLru, "on_demand", nullptr);
    runtime->Suspend();
    if (warm) {
      EXPECT_GT(runtime->WarmStart(shares, file_->keys()), 4);
    } else {
      runtime->Resume();
    }
    EXPECT_EQ(Decode(runtime.get(), runtime.get()), Resident());
    const PhaseStats stats = runtime->stats(Stack::kDecoder);
    return static_cast<double>(stats.hits) / static_cast<double>(stats.uses);
  };
  EXPECT_LT(hits(false), 1);
  EXPECT_EQ(hits(true), 1);
}

TEST_P(PrefetchRuntimeTest, AnExpertThatCannotBeReadIsAnEnvironmentError) {
  const auto damaged = std::make_shared<ExpertFile>(file_->path());
  DiskTransferEngine engine(damaged, 4, {2, 4096, 0, true, true});
  fs::resize_file(file_->path(), 8192);
  auto runtime = Runtime(&engine, 4, Eviction::kLru, "on_demand", nullptr);
  try {
    Decode(runtime.get(), runtime.get());
    FAIL() << "nothing was thrown";
  } catch (const EnvironmentError& e) {
    EXPECT_THAT(e.what(), testing::ContainsRegex("cut expert file: .*; no byte at"));
    EXPECT_THAT(e.what(), testing::Not(testing::HasSubstr("?")));
  }
}

}  // namespace
}  // namespace routecast
