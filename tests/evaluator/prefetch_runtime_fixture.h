// Generation by a checkpoint whose experts come through a runtime, and its resident bits.
#pragma once

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cerrno>

#include "evaluator/disk_transfer_engine.h"
#include "evaluator/expert_store.h"
#include "evaluator/output_hash.h"
#include "evaluator/prefetch_runtime.h"
#include "evaluator/workload.h"
#include "models/generation.h"
#include "tests/evaluator/strange_predictor.h"
#include "tests/models/switch_test_support.h"

namespace routecast {

class PrefetchRuntimeTest : public testing::TestWithParam<StepMemory> {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / (std::string(program_invocation_short_name) +
                                           "." + std::to_string(::getpid()));
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

}  // namespace routecast
