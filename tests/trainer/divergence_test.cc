// A training step asks its device for the losses and nothing else; and what is no number
// any more ends the training within a step, by name, with the last checkpoint as it was.
#include "trainer/divergence.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "tests/storage/temp_folder.h"
#include "tests/support/host_reads.h"
#include "tests/trainer/synthetic_traces.h"
#include "tests/trainer/training_in_memory.h"
#include "trainer/member_optimizer.h"
#include "trainer/train_state.h"

namespace routecast {
namespace {

using testing::HasSubstr;

constexpr uint16_t kNaN = 0x7fc0;  // of bfloat16

class Divergence : public testing::Test {
 protected:
  static SyntheticTraces Traces() {
    return TraceSynthesizer(/*layers=*/3, /*experts=*/8, /*width=*/24,
                            /*vocabulary=*/200, /*seed=*/5)
        .Make(60, 6, 24, /*every_hidden=*/false);
  }
  SpeculationJob Job(const std::string& kind = "hidden") const {
    SpeculationJob job;
    job.options.kind = kind;
    job.options.sizes = {16, 2, 32, 1, 0, -1};
    job.options.steps = 8;
    job.options.validate_every = 100;
    job.options.log_every = 100;
    job.options.global_batch = 16;
    job.options.micro_batch = 4;
    job.options.validation_sequences = job.options.test_sequences = 4;
    job.out = folder_.path() / "run";
    job.quiet = true;
    return job;
  }
  static std::string WhyDiverged(const SpeculationJob& job, const SyntheticTraces& s) {
    try {
      Train(job, s);
    } catch (const DivergedError& e) {
      EXPECT_LE(std::count(e.what(), e.what() + std::strlen(e.what()), '\n'), 2);
      return e.what();
    }
    return "it did not diverge";
  }
  TempFolder folder_;
};

// Twice the steps, everything else as often: what the steps themselves read.
TEST_F(Divergence, AStepReadsNoNumberByItself) {
  const SyntheticTraces traces = Traces();
  for (const char* kind : {"hidden", "ensemble"}) {
    SpeculationJob job = Job(kind);
    if (kind == std::string("ensemble")) {
      job.options.sizes = {};
      job.options.members =
          "interlayer*2:width=16,heads=2,layers=1,clip=.01;"
          "hidden:width=16,heads=2,clip=1e9";
      job.options.ema = 0.5;
    }
    const auto reads = [&](int64_t steps) {
      job.options.steps = steps;
      job.out = folder_.path() / (kind + std::to_string(steps));
      return HostReads([&] { Train(job, traces); });
    };
    const int once = reads(4);
    EXPECT_GT(once, 0) << "counts nothing";
    EXPECT_EQ(reads(8), once) << kind;
    job.options.log_every = 1;  // a line has the gradient's norm
    EXPECT_EQ(reads(8), once + 7) << kind;
  }
}

TEST_F(Divergence, ABrokenGradientChangesNoParameterAndNoMoment) {
  const auto model = MakeSpeculationModel(
      DefaultSpeculationConfig("interlayer", Traces().geometry, 200, 0), 9);
  MemberOptimizer optimizer(*model, {{1e-2, 0.1, 1, 0}}, .9, .99, 0);
  for (const auto& [name, tensor] : model->parameters().items()) {
    at::Tensor(tensor).mutable_grad() = at::ones_like(tensor);
  }
  optimizer.Step(1);
  EXPECT_NO_THROW(optimizer.RequireFinite());
  std::vector<at::Tensor> before;
  const Parameters moments = optimizer.adamw().State();
  for (const Parameters* all : {&std::as_const(*model).parameters(), &moments}) {
    for (const at::Tensor& x : all->tensors()) before.push_back(x.detach().clone());
  }
  for (const double value : {NAN, INFINITY}) {
    const auto [name, last] = model->parameters().items().back();
    last.grad().fill_(value);
    optimizer.Step(1);
    size_t i = 0;
    for (const Parameters* all : {&std::as_const(*model).parameters(), &moments}) {
      for (const at::Tensor& x : all->tensors()) EXPECT_TRUE(x.equal(before[i++]));
    }
    try {
      optimizer.RequireFinite();
      FAIL();
    } catch (const DivergedError& e) {
      EXPECT_THAT(e.what(), HasSubstr("the gradient of " + name + " "));
    }
  }
}

// Each is finite, their norm is not.
TEST_F(Divergence, AnOverflowingNormIsNoStepEither) {
  const auto model = MakeSpeculationModel(
      DefaultSpeculationConfig("interlayer", Traces().geometry, 200, 0), 9);
  MemberOptimizer optimizer(*model, {{1e-2, 0.1, 1, 0}}, .9, .99, 0);
  for (const auto& [name, tensor] : model->parameters().items()) {
    at::Tensor(tensor).mutable_grad() = at::full_like(tensor, 1e30);
  }
  optimizer.Step(1);
  EXPECT_THROW(optimizer.RequireFinite(), DivergedError);
}

// The weights of step 4 were whole: the training goes on from them once the input is.
TEST_F(Divergence, ABrokenInputIsNamedAndTheLastCheckpointKept) {
  const SyntheticTraces traces = Traces();
  SpeculationJob job = Job();
  job.out = folder_.path() / "undisturbed";
  Train(job, traces);
  const std::string undisturbed = ReadFile(job.out / "model.safetensors");
  job.out = folder_.path() / "run";
  job.stop_after = 4;
  EXPECT_THROW(Train(job, traces), StoppedError);
  job.stop_after = 0;
  SyntheticTraces broken = traces;
  for (RoutingTrace& t : broken.traces) {
    if (SplitOf(t.group_id) != SplitPart::kTrain) continue;
    std::fill(t.decoder.hidden.begin(), t.decoder.hidden.end(), kNaN);
    std::fill(t.encoder.hidden.begin(), t.encoder.hidden.end(), kNaN);
  }
  const std::string why = WhyDiverged(job, broken);
  EXPECT_THAT(why, HasSubstr("in step 5 (micro-batch "));
  EXPECT_THAT(why, testing::ContainsRegex("not finite: router input.*\\("));
  EXPECT_EQ(FindTrainState(job.out / "state")->step, 4);
  Train(job, traces);
  EXPECT_EQ(ReadFile(job.out / "model.safetensors"), undisturbed);
}

// At such a rate the first step leaves no number, or numbers whose products are none.
TEST_F(Divergence, AParameterOrAnOutputIsNamedInTheStepAfter) {
  SpeculationJob job = Job("simple");
  job.options.schedule.name = "constant";
  job.options.schedule.warmup_steps = 0;
  job.options.training.learning_rate = 1e39;
  std::string why = WhyDiverged(job, Traces());
  EXPECT_THAT(why, HasSubstr("in step 2 "));
  EXPECT_THAT(why, HasSubstr("not finite: parameter "));
  job.options.training.learning_rate = 1e30;
  job.out = folder_.path() / "output";
  why = WhyDiverged(job, Traces());
  EXPECT_THAT(why, HasSubstr("in step 2 "));
  EXPECT_THAT(why, HasSubstr("not finite: output logits\n"));
}

}  // namespace
}  // namespace routecast
