// Two ranks against one: equal losses over 60 steps at equal global batch, equal scores.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>

#include "comm/mpi_session.h"
#include "common/errors.h"
#include "tests/trainer/synthetic_traces.h"
#include "trainer/speculation_trainer.h"

namespace routecast {
namespace {

const MpiSession* session = nullptr;

TEST(SpeculationRanks, TwoRanksTrainLikeOne) {
  const auto comm = MakeCommunicator(*session, at::kCPU);
  const RankInfo rank = comm->rank_info();
  const SyntheticTraces traces =
      TraceSynthesizer(3, 8, 24, 200, 5)
          .Make(120, 6, 24, /*every_hidden=*/false, /*top_k=*/0, /*attention_heads=*/2);
  // `interlayer` is the heavier one: enough steps to see that it goes the same way.
  const auto steps = [](const std::string& kind) { return kind == "hidden" ? 60 : 12; };
  const auto train = [&](const std::string& kind, const std::string& name,
                         Communicator* with) {
    TraceDataset dataset(traces.traces, traces.geometry);
    SpeculationJob job;
    job.options.attention_inputs = kind == "hidden_attention";
    job.options.kind = job.options.attention_inputs ? "hidden" : kind;
    if (kind == "hidden_bf16") {
      job.options.kind = "hidden";
      job.options.dtype = "bf16";
    }
    if (kind == "ensemble") {
      job.options.members = "interlayer*2:width=16,heads=2,layers=1;simple";
      job.options.augment.layer_dropout = 0.2;
      job.options.curriculum_epochs = 1;
    }
    TraceDataset elsewhere(traces.traces, traces.geometry);
    if (kind == "ensemble_stack") {
      job.options.kind = "ensemble";
      job.options.members = "interlayer:width=16,heads=2,layers=1;simple";
      job.options.combine = "stack";
      job.shift = {"elsewhere", &elsewhere};
    }
    if (kind == "interlayer") {
      job.options.contrastive_weight = 0.1;
      job.options.augment.mixup = 0.3;
      job.options.augment.noise = 0.05;
    }
    job.options.steps = steps(kind);
    job.options.validation_sequences = 8;
    job.options.test_sequences = 8;
    job.options.global_batch = 24;
    job.options.micro_batch = 4;
    job.options.validate_every = steps(kind) / 2;
    job.quiet = true;
    // Many buckets: ranks whose last micro-batches are of different stacks send different
    // ones early.
    job.bucket_bytes = 1 << 14;
    job.out = fs::path(testing::TempDir()) / ("speculation_ranks_" + kind + name);
    const SpeculationResult result =
        TrainSpeculation(job, &dataset, traces.routers, with);
    return result;
  };
  for (const std::string kind : {"hidden", "hidden_attention", "hidden_bf16",
                                 "interlayer", "ensemble", "ensemble_stack"}) {
    const SpeculationResult many = train(kind, "_many", comm.get());
    LocalCommunicator alone;
    const SpeculationResult one =
        train(kind, "_one_" + std::to_string(rank.rank), &alone);
    ASSERT_EQ(many.losses.size(), static_cast<size_t>(steps(kind)));
    for (size_t i = 0; i < many.losses.size(); ++i) {
      EXPECT_NEAR(many.losses[i], one.losses[i], 1e-5 * std::abs(one.losses[i]))
          << kind << " step " << i + 1;
    }
    EXPECT_EQ(many.results["world_size"], rank.world);
    EXPECT_EQ(many.results["neighbours"], one.results["neighbours"]);
    for (const char* key : {"scores", "scores_after_shift"}) {
      ASSERT_EQ(one.results.contains(key),
                key == std::string("scores") || kind == "ensemble_stack");
      if (!one.results.contains(key)) continue;
      const Json &all = many.results[key], &expected = one.results[key];
      ASSERT_EQ(all.size(), expected.size());
      for (size_t i = 0; i < expected.size(); ++i) {
        const Json &a = all[i], &b = expected[i];
        EXPECT_EQ(a["samples"], b["samples"]);
        EXPECT_NEAR(a["cross_entropy"].get<double>(), b["cross_entropy"].get<double>(),
                    1e-3);
      }
    }
    for (const auto& [name, entries] : one.results["baselines"].items()) {
      for (size_t i = 0; i < entries.size(); ++i) {
        EXPECT_EQ(many.results["baselines"][name][i]["top1"], entries[i]["top1"]) << name;
      }
    }
  }
  // One rank's time ends the training of all.
  {
    TraceDataset dataset(traces.traces, traces.geometry);
    SpeculationJob job;
    job.options.kind = "simple";
    job.options.steps = 4;
    job.options.global_batch = 8;
    job.options.micro_batch = 4;
    job.options.validation_sequences = job.options.test_sequences = 4;
    job.quiet = true;
    job.time_limit = rank.rank == 1 ? 1e-9 : 0;
    job.out = fs::path(testing::TempDir()) / "speculation_ranks_time";
    const auto result = TrainSpeculation(job, &dataset, traces.routers, comm.get());
    EXPECT_EQ(result.losses.size(), 1u);
  }
  // A rank without a micro-batch would wait in every step.
  TraceDataset dataset(traces.traces, traces.geometry);
  SpeculationJob few;
  few.options.global_batch = few.options.micro_batch = 4;
  few.out = fs::path(testing::TempDir()) / "speculation_ranks_few";
  EXPECT_THROW(TrainSpeculation(few, &dataset, traces.routers, comm.get()), UsageError);
  comm->Barrier();
  if (rank.is_root()) {
    for (const auto& entry : fs::directory_iterator(testing::TempDir())) {
      if (entry.path().filename().string().rfind("speculation_ranks_", 0) == 0) {
        fs::remove_all(entry.path());
      }
    }
  }
}

}  // namespace
}  // namespace routecast

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  const routecast::MpiSession mpi(&argc, &argv);
  routecast::session = &mpi;
  return RUN_ALL_TESTS();
}
