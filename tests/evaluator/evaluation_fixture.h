// A small checkpoint and a store of synthetic traces on disk, to be evaluated.
#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cerrno>

#include "evaluator/evaluation.h"
#include "tests/evaluator/synthetic_store.h"
#include "tests/models/switch_test_support.h"

namespace routecast {

class EvaluationTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = fs::temp_directory_path() / (std::string(program_invocation_short_name) +
                                           "." + std::to_string(::getpid()));
    fs::create_directories(folder_ / "model");
    const Checkpoint made = RandomCheckpoint(SmallConfig(), 3);
    SaveCheckpoint(folder_ / "model", made.config, made.parameters, at::kFloat);
    WriteSyntheticStore(folder_ / "store", made.config);
  }
  static void TearDownTestSuite() { fs::remove_all(folder_); }

  EvaluationOptions Options() const {
    EvaluationOptions options;
    options.store = folder_ / "store";
    options.cache = folder_ / "cache";
    options.compare = true;
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
    return options;
  }
  static inline fs::path folder_;
};

}  // namespace routecast
