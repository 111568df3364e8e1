// Whatever is predicted, and however small the budget: the same bits come out, of decoder
// steps in memory that grows and in fixed memory.
#include "evaluator/prefetch_runtime.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <set>

#include "common/errors.h"
#include "common/random.h"
#include "evaluator/disk_transfer_engine.h"
#include "evaluator/expert_store.h"
#include "evaluator/expert_tiers.h"
#include "evaluator/paced_compute.h"
#include "evaluator/workload.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/evaluator/fake_device.h"
#include "tests/evaluator/prefetch_runtime_fixture.h"

namespace routecast {
namespace {

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
