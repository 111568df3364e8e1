// The meta-learner of an ensemble: the average where weights are equal, the least loss on
// documents that no member learnt from, and in all that is saved and served.
#include "trainer/ensemble_stack.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "models/ensemble_model.h"
#include "models/predictor_factory.h"
#include "tests/storage/temp_folder.h"
#include "tests/trainer/synthetic_traces.h"
#include "tests/trainer/training_in_memory.h"

namespace routecast {
namespace {

class EnsembleStack : public testing::Test {
 protected:
  EnsembleStack()
      : synthetic_(TraceSynthesizer(/*layers=*/3, /*experts=*/8, /*width=*/24,
                                    /*vocabulary=*/200, /*seed=*/5)
                       .Make(120, 6, 20, /*every_hidden=*/true)) {}

  // One member learns much, one little, one nothing.
  SpeculationJob Job(const std::string& combine) const {
    SpeculationJob job;
    job.options.kind = "ensemble";
    job.options.members =
        "hidden:width=16,heads=2,lr=6e-3;simple:width=16,lr=1e-3;"
        "interlayer:width=16,heads=2,layers=1,lr=1e-9";
    job.options.combine = combine;
    job.options.steps = 40;
    job.options.global_batch = 16;
    job.options.micro_batch = 8;
    job.out = folder_.path() / combine;
    job.quiet = true;
    return job;
  }
  EvaluationData Part(TraceDataset* dataset, SplitPart part) const {
    const auto groups = GroupsOf(*dataset, part, WithHidden::kYes);
    return {dataset, EvaluationBatches(*dataset, groups, 32, 0, 1), WithHidden::kYes,
            at::kCPU};
  }
  double LossOn(SpeculationModel* model, SplitPart part) const {
    TraceDataset dataset(synthetic_.traces, synthetic_.geometry);
    LocalCommunicator comm;
    return Validate(model, Part(&dataset, part), &comm).loss;
  }
  static at::Tensor AllWeights(const SpeculationModel& model) {
    return model.constants().Get("stack.weights");
  }

  TempFolder folder_;
  const SyntheticTraces synthetic_;
};

TEST_F(EnsembleStack, EqualWeightsAreTheAverageOfLogits) {
  Train(Job("logits"), synthetic_);
  const c10::NoGradGuard no_grad;
  auto average = LoadSpeculationModel(folder_.path() / "logits").model;
  SetMemberWeights(average.get(), {1, 1, 1});
  SpeculationConfig config = average->config();
  config.combine = "stack";
  const auto stacked = MakeSpeculationModel(config, 1);
  for (const auto& [name, x] : stacked->parameters().items()) {
    at::Tensor(x).copy_(average->parameters().Get(name));
  }
  for (const auto& [name, x] : stacked->constants().items()) {
    if (average->constants().Has(name))
      at::Tensor(x).copy_(average->constants().Get(name));
  }
  const RoutingWindow window =
      WindowOf(synthetic_.traces[0], Stack::kDecoder, 1, synthetic_.geometry.num_experts);
  const auto expected = average->Forward(window, 0), got = stacked->Forward(window, 0);
  EXPECT_TRUE(at::allclose(got.logits_BTHE.softmax(-1), expected.logits_BTHE.softmax(-1),
                           1e-5, 1e-6));
  EXPECT_TRUE(at::allclose(got.confidence_BTH, expected.confidence_BTH));
  // Weights of one place change its answers and no other's.
  StackWeights(*stacked, Stack::kDecoder, 1, 2).copy_(at::tensor({1.f, 0.f, 0.f}));
  const auto changed = stacked->Forward(window, 0).logits_BTHE;
  const auto first = stacked->ForwardMembers(window, 0)[0].logits_BTHE;
  EXPECT_TRUE(at::allclose(changed.select(2, 1), first.select(2, 1).log_softmax(-1)));
  EXPECT_TRUE(at::equal(changed.select(2, 0), got.logits_BTHE.select(2, 0)));
}

TEST_F(EnsembleStack, IsBetterThanTheAverageAndTheWorst) {
  const Json stack = Train(Job("stack"), synthetic_).results;
  double worst = 0, best = 1e9;
  for (const Json& member : stack["members"]) {
    const double loss = member["validation_loss"];
    worst = std::max(worst, loss);
    best = std::min(best, loss);
  }
  EXPECT_GT(worst, best + 0.3) << "members too alike to tell";
  EXPECT_LT(stack["validation"]["loss"].get<double>(), best + 1e-3);
  // On documents that nothing was fitted on.
  const auto loss_with = [&](const at::Tensor& weights_M) {
    const auto model = LoadSpeculationModel(folder_.path() / "stack").model;
    if (weights_M.defined()) AllWeights(*model).copy_(weights_M);
    return LossOn(model.get(), SplitPart::kTest);
  };
  const double together = loss_with({});
  EXPECT_LT(together, loss_with(at::full({3}, 1. / 3)) - 0.01) << "the average";
  double most = 0;
  for (int m = 0; m < 3; ++m) {
    most = std::max(most, loss_with(at::eye(3).select(0, m)));
  }
  EXPECT_LT(together, most - 0.3);
}

// Its weights are those of the validation documents' least loss: not the train part's.
TEST_F(EnsembleStack, IsFittedWhereNoMemberLearnt) {
  SpeculationJob job = Job("stack");
  job.options.validation_sequences = 0;
  Train(job, synthetic_);
  const auto model = LoadSpeculationModel(job.out).model;
  const at::Tensor fitted = AllWeights(*model).clone();
  TraceDataset dataset(synthetic_.traces, synthetic_.geometry);
  LocalCommunicator comm;
  const auto fit = [&](SplitPart part) {
    AllWeights(*model).fill_(1. / 3);
    FitStack(model.get(), Part(&dataset, part), &comm);
    return AllWeights(*model).clone();
  };
  EXPECT_TRUE(at::allclose(fit(SplitPart::kValidation), fitted, 1e-2, 1e-3));
  EXPECT_FALSE(at::allclose(fit(SplitPart::kTrain), fitted, 1e-2, 1e-2));
  // No step away from them is better.
  at::Tensor weights = StackWeights(*model, Stack::kDecoder, 1, 1);
  fit(SplitPart::kValidation);
  const double least = LossOn(model.get(), SplitPart::kValidation);
  for (int m = 0; m < 3; ++m) {
    for (const double step : {-0.2, 0.2}) {
      weights[m] += step;
      EXPECT_GT(LossOn(model.get(), SplitPart::kValidation), least);
      weights[m] -= step;
    }
  }
}

TEST_F(EnsembleStack, IsServedWithItsWeights) {
  const SpeculationJob job = Job("stack");
  Train(job, synthetic_);
  const SavedSpeculationModel saved = LoadSpeculationModel(job.out);
  EXPECT_FALSE(at::allclose(AllWeights(*saved.model),
                            at::full_like(AllWeights(*saved.model), 1. / 3), 0, 0.1));
  const auto predictor = LoadPredictor(job.out.string(), synthetic_.geometry, "", {});
  const RoutingWindow window =
      WindowOf(synthetic_.traces[0], Stack::kDecoder, 1, synthetic_.geometry.num_experts);
  const auto logits = saved.model->Forward(window, 0).logits_BTHE.select(2, 0);
  const double t = saved.calibration.Temperature(Stack::kDecoder, 1, 1);
  EXPECT_TRUE(
      at::allclose(*predictor->Predict(window, 1), (logits / t).softmax(-1), 1e-3, 1e-4));
}

}  // namespace
}  // namespace routecast
