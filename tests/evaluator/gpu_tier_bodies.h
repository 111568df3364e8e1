// Generation and replay with experts behind a gpu tier, from store and checkpoint to
// results.json: the same bodies on a fake device (gpu_tier_test) and on a card
// (gpu_tier_gpu_test).
#pragma once

#include <unistd.h>

#include <functional>
#include <set>
#include <string>

#include "evaluator/evaluation.h"
#include "gtest/gtest.h"
#include "tests/evaluator/synthetic_store.h"
#include "tests/models/switch_test_support.h"
#include "tests/support/reference.h"

namespace routecast {

class GpuTierBodies : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = fs::temp_directory_path() / ("gpu_tier." + std::to_string(::getpid()));
    fs::create_directories(folder_ / "model");
    const Checkpoint made = RandomCheckpoint(SmallConfig(), 3);
    SaveCheckpoint(folder_ / "model", made.config, made.parameters, at::kFloat);
    WriteSyntheticStore(folder_ / "store", made.config);
  }
  static void TearDownTestSuite() { fs::remove_all(folder_); }

  // Where the fastest tier is.
  virtual void Place(EvaluationOptions* options) = 0;

  EvaluationOptions Options(bool generates) {
    EvaluationOptions options;
    options.store = folder_ / "store";
    if (generates) options.model = folder_ / "model";
    options.cache = folder_ / "cache";
    options.compare = true;
    options.baselines = "simple";
    options.rounds = 2;
    options.warmup_rounds = 1;
    options.max_new_tokens = 4;
    options.quiet = true;
    options.peak_seconds = 0.02;
    options.replay.d_model = 32;
    options.replay.d_ff = 64;
    options.replay.d_kv = 8;
    options.replay.num_heads = 4;
    options.replay.vocab_size = 128;
    options.out = folder_ / "out";
    Place(&options);
    return options;
  }
  Json Run(const EvaluationOptions& options) {
    ValidateEvaluation(options);
    Evaluate(options, Json::object());
    return ReadJsonFile(options.out / "results.json");
  }
  // Whatever waits behind the device, one output.
  void EveryRowPutsOutTheSameBits(bool generates, const char* dtype = "fp32") {
    EvaluationOptions options = Options(generates);
    options.dtype = dtype;
    const Json results = Run(options);
    std::set<std::string> hashes, policies;
    for (const Json& row : results["rows"]) {
      EXPECT_EQ(row["tier"], managed_ ? "managed" : "gpu");
      EXPECT_TRUE(row["lossless"].get<bool>());
      EXPECT_LE(row["held_bytes_peak"], row["budget_bytes"]);
      hashes.insert(row["output_sha256"]);
      policies.insert(row["policy"]);
    }
    EXPECT_EQ(hashes.size(), 1u);
    EXPECT_EQ(policies.count("resident"), 1u);
    EXPECT_GE(results["rows"].size(), 6u);
  }
  void AHostTierMayHoldAPartOnly() {
    EvaluationOptions options = Options(false);
    options.tier = "gpu:98304,host:65536,disk";  // six experts of 16 KiB, and four
    options.budget_given = false;
    const Json results = Run(options);
    for (const Json& row : results["rows"]) {
      EXPECT_TRUE(row["lossless"].get<bool>());
      if (row["policy"] != "resident") {
        EXPECT_EQ(row["budget_bytes"], 98304);
      }
    }
    const std::string record = ReadJsonFile(options.out / "run.json").dump();
    EXPECT_NE(record.find("the host tier holds 4 of"), std::string::npos) << record;
  }
  // Every expert that is not on the device comes from the disk, through eight slots.
  void HostMemoryMayBePassedThroughOnly() {
    EvaluationOptions options = Options(false);
    options.tier = "gpu:98304,disk";
    options.budget_given = false;
    const Json results = Run(options);
    for (const Json& row : results["rows"]) {
      EXPECT_TRUE(row["lossless"].get<bool>());
      EXPECT_EQ(row["tier"], "gpu");
    }
    const std::string record = ReadJsonFile(options.out / "run.json").dump();
    EXPECT_EQ(record.find("the host tier holds"), std::string::npos) << record;
  }
  void CompressedCopiesAreDecodedOnTheDevice() {
    EvaluationOptions options = Options(false);
    options.copies = "int8";
    int lossy = 0;
    const Json results = Run(options);
    for (const Json& row : results["rows"]) {
      if (row["copies"] == "lossless") {
        EXPECT_TRUE(row["lossless"].get<bool>());
        continue;
      }
      ++lossy;
      EXPECT_GT(row["logit_kl"], 0);
      EXPECT_LT(row["logit_kl"], 0.01);
    }
    EXPECT_GE(lossy, 2);
  }

  bool managed_ = false;
  inline static fs::path folder_;
};

}  // namespace routecast
