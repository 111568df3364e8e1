// A comparison over a small replay of synthetic traces.
#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cerrno>

#include "evaluator/comparison.h"
#include "evaluator/expert_copies.h"
#include "evaluator/expert_store.h"
#include "evaluator/replay.h"
#include "tests/evaluator/synthetic_traces.h"

namespace routecast {

class ComparisonTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / (std::string(program_invocation_short_name) +
                                           "." + std::to_string(::getpid()));
    traces_.geometry = {2, 2, 6, 1, 0};
    traces_.tokens = 6;
    replay_.d_model = 32;
    replay_.d_ff = 64;
    replay_.d_kv = 8;
    replay_.num_heads = 4;
    replay_.vocab_size = 512;
    replay_.encoder = true;
    options_.rounds = 3;
    options_.warmup_rounds = 1;
    options_.quiet = true;
    options_.peak_seconds = 0.02;
    options_.synthetic_weights = true;
  }
  void TearDown() override { fs::remove_all(folder_); }

  ComparisonResult Compare(std::vector<ExpertPredictor*> predictors) {
    replay_.batch = options_.batch;
    ReplayWorkload workload(traces_.geometry, SyntheticTraces(traces_, 4, 1), replay_);
    const auto file =
        SyntheticExperts(folder_, workload.geometry(), replay_.d_ff, 1, replay_.encoder,
                         replay_.decoder, at::kFloat, true);
    if (options_.budget_bytes == 0)
      options_.budget_bytes = 6 * file->spec().stride_bytes();
    if (copies_ != CopyKind::kLossless)
      options_.copies = CompressedCopy(file, copies_, true);
    Comparison comparison(&workload, file, std::move(predictors), options_);
    return comparison.Run();
  }

  fs::path folder_;
  SyntheticTraceOptions traces_;
  ReplayOptions replay_;
  ComparisonOptions options_;
  CopyKind copies_ = CopyKind::kLossless;
};

}  // namespace routecast
