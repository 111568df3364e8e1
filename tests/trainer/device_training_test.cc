// Training on every device: each kind of speculation model for a few steps, and a step of
// pre-training against the CPU's.
#include "tests/models/device_test.h"
#include "tests/models/switch_test_support.h"
#include "tests/storage/temp_folder.h"
#include "tests/trainer/synthetic_traces.h"
#include "trainer/adamw.h"
#include "trainer/gradient_reducer.h"
#include "trainer/speculation_trainer.h"
#include "trainer/switch_losses.h"

namespace routecast {
namespace {

class DeviceTraining : public DeviceTest {};
ROUTECAST_INSTANTIATE_DEVICES(DeviceTraining);

TEST_P(DeviceTraining, EveryKindIsTrainedAndScored) {
  const SyntheticTraces made =
      TraceSynthesizer(/*layers=*/3, /*experts=*/8, /*width=*/24, /*vocabulary=*/200,
                       /*seed=*/5)
          .Make(24, 6, 24, /*every_hidden=*/false, /*top_k=*/3);
  for (const std::string& kind : SpeculationKinds()) {
    const TempFolder folder;
    SpeculationJob job;
    job.options.kind = kind;
    job.options.steps = 3;
    job.options.global_batch = 8;
    job.options.micro_batch = 4;
    job.options.validate_every = 2;
    job.options.validation_sequences = job.options.test_sequences = 4;
    job.options.sizes = {24, 2, 32, 2, 0, -1};
    job.options.distill_weight = 0.3;
    job.options.set_weight = 0.1;
    job.out = folder.path() / "run";
    job.device = device();
    job.quiet = true;
    TraceDataset dataset(made.traces, made.geometry, {.keep_top_k = true});
    LocalCommunicator comm;
    SpeculationResult result;
    try {
      result = TrainSpeculation(job, &dataset, made.routers, &comm);
    } catch (const std::exception& e) {
      ADD_FAILURE() << kind << ": " << e.what();
      continue;
    }
    ASSERT_EQ(result.losses.size(), 3u) << kind;
    for (const double loss : result.losses) EXPECT_TRUE(std::isfinite(loss)) << kind;
    EXPECT_FALSE(result.results["scores"].empty()) << kind;
    LoadSpeculationModel(job.out);  // throws where a weight is not finite
  }
  at::globalContext().setDeterministicAlgorithms(false, false);
}

TEST_P(DeviceTraining, EveryKindTakesAStepInBf16) {
  const SyntheticTraces made = TraceSynthesizer(3, 8, 24, 200, 5).Make(20, 6, 16, false);
  for (const std::string& kind : SpeculationKinds()) {
    const TempFolder folder;
    SpeculationJob job;
    job.options.kind = kind;
    job.options.dtype = "bf16";
    job.options.steps = 1;
    job.options.global_batch = job.options.micro_batch = 4;
    job.options.validation_sequences = job.options.test_sequences = 2;
    job.options.sizes = {24, 2, 32, 1, 0, 0.1};
    job.out = folder.path() / "run";
    job.device = device();
    job.quiet = true;
    TraceDataset dataset(made.traces, made.geometry);
    LocalCommunicator comm;
    try {
      const auto result = TrainSpeculation(job, &dataset, made.routers, &comm);
      EXPECT_TRUE(std::isfinite(result.losses.at(0))) << kind;
    } catch (const std::exception& e) {
      ADD_FAILURE() << kind << ": " << e.what();
    }
  }
  at::globalContext().setDeterministicAlgorithms(false, false);
}

struct Step {
  double loss = 0, norm = 0, norm_after = 0;
};

// One step of pre-training a small model on `device`.
Step PretrainStep(const SwitchConfig& config, at::Device device) {
  const Checkpoint made = RandomCheckpoint(config, 4);
  Parameters parameters;
  for (const auto& [name, tensor] : made.parameters.items()) {
    parameters.Add(name, tensor.detach().clone().to(device).requires_grad_());
  }
  ResidentModel resident({config, parameters, {}});
  LocalCommunicator comm;
  GradientReducer reducer(parameters.tensors(), &comm);
  AdamW optimizer(parameters, {});
  at::manual_seed(9);
  DenoisingBatch batch;
  batch.ids_BS = at::randint(2, 96, {3, 12}, at::kLong);
  batch.valid_BS = at::arange(12).unsqueeze(0) < at::tensor({12, 9, 5}).unsqueeze(1);
  batch.masked_targets_BS = at::where(at::rand({3, 12}) < 0.3, batch.ids_BS, -100);
  batch.decoder_ids_BT = at::randint(2, 96, {3, 7}, at::kLong);
  batch.decoder_valid_BT =
      at::arange(7).unsqueeze(0) < at::tensor({7, 4, 6}).unsqueeze(1);
  batch.targets_BT = at::randint(2, 96, {3, 7}, at::kLong)
                         .masked_fill(batch.decoder_valid_BT.logical_not(), -100);
  const auto run = [&](Step* step) {
    reducer.BeginStep();
    reducer.LastBackward();
    RoutingCollector routing;
    ForwardOptions forward;
    forward.observer = &routing;
    forward.jitter = 0.01;
    forward.jitter_key = 3;
    const DenoisingLoss loss = DenoisingLosses(&resident.model(), batch, forward);
    at::Tensor total = loss.span + loss.masked + 0.01 * BalanceLoss(routing);
    total.backward();
    reducer.Finalize(1);
    step->loss = total.item<double>();
    return reducer.GradientNorm().item<double>();
  };
  Step step, after;
  step.norm = run(&step);
  optimizer.Step(1e-4);
  step.norm_after = run(&after);
  return step;
}

TEST_P(DeviceTraining, AStepOfPretrainingIsThatOfTheCpu) {
  for (const int capacity : {64, 2}) {  // none dropped, and many
    SwitchConfig config = SmallConfig();
    config.expert_capacity = capacity;
    const Step there = PretrainStep(config, device()),
               here = PretrainStep(config, at::kCPU);
    EXPECT_NEAR(there.loss, here.loss, 1e-3 * here.loss) << capacity;
    EXPECT_NEAR(there.norm, here.norm, 1e-2 * here.norm) << capacity;
    EXPECT_NEAR(there.norm_after, here.norm_after, 2e-2 * here.norm_after) << capacity;
    EXPECT_NE(there.norm, there.norm_after) << "the optimizer changed nothing";
  }
}

}  // namespace
}  // namespace routecast
