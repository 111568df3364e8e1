// Training in bfloat16: products are, and nothing else is.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "models/speculation_layers.h"
#include "tests/storage/temp_folder.h"
#include "tests/trainer/training_in_memory.h"
#include "trainer/autocast.h"

namespace routecast {
namespace {

const at::Device kCpu = at::kCPU;

TEST(AutocastScopeTest, ProductsAreBf16InsideOnly) {
  const at::Tensor x = at::ones({2, 4}), w = at::ones({3, 4}).requires_grad_();
  {
    const AutocastScope scope(kCpu, at::kBFloat16);
    EXPECT_EQ(at::linear(x, w).scalar_type(), at::kBFloat16);
    { const AutocastScope inner(kCpu, at::kBFloat16); }
    EXPECT_EQ(at::linear(x, w).scalar_type(), at::kBFloat16) << "the inner one's end";
  }
  EXPECT_EQ(at::linear(x, w).scalar_type(), at::kFloat);
  const AutocastScope nothing(kCpu, at::kFloat);
  EXPECT_EQ(at::linear(x, w).scalar_type(), at::kFloat);
}

TEST(AutocastScopeTest, APassSeesTheParametersOfItsTime) {
  const at::Tensor x = at::ones({1, 1}), w = at::ones({1, 1}).requires_grad_();
  for (const double value : {1.0, 3.0}) {
    w.detach().fill_(value);
    const AutocastScope scope(kCpu, at::kBFloat16);
    EXPECT_EQ(at::linear(x, w).item<double>(), value);
  }
}

TEST(AutocastScopeTest, GradientsAreThoseOfParameters) {
  const at::Tensor w = at::ones({3, 4}).requires_grad_();
  at::Tensor y;
  {
    const AutocastScope scope(kCpu, at::kBFloat16);
    y = at::linear(at::ones({2, 4}), w);
  }
  y.to(at::kFloat).sum().backward();
  EXPECT_EQ(w.grad().scalar_type(), at::kFloat);
  EXPECT_TRUE(at::equal(w.grad(), at::full({3, 4}, 2.0)));
}

TEST(KeyedDropoutTest, DrawsTheSameOfBf16) {
  const at::Tensor ones = at::ones({6, 50});
  KeyedDropout wide(0.3, 7), narrow(0.3, 7);
  const at::Tensor expected = wide(ones), drawn = narrow(ones.to(at::kBFloat16));
  EXPECT_GT(expected.eq(0).sum().item<int>(), 0);
  EXPECT_EQ(drawn.scalar_type(), at::kFloat);
  EXPECT_TRUE(at::equal(drawn, expected));
}

TEST(ForwardMembersAsTest, OutputsAreFp32AndWereRounded) {
  const SyntheticTraces made = TraceSynthesizer(3, 8, 24, 200, 5).Make(2, 6, 12, true);
  SpeculationConfig config = DefaultSpeculationConfig("moe", made.geometry, 200, 24);
  config.width = 16;
  config.heads = 2;
  config.ff = 32;
  config.layers = 2;
  const auto model = MakeSpeculationModel(config, 3);
  const RoutingWindow window = WindowOf(made.traces[0], Stack::kDecoder, 1, 6);
  const auto run = [&](at::ScalarType dtype) {
    return ForwardMembersAs(dtype, model.get(), window, 11)[0];
  };
  const SpeculationOutput full = run(at::kFloat), rounded = run(at::kBFloat16);
  for (const at::Tensor& x :
       {rounded.logits_BTHE, rounded.confidence_BTH, rounded.own_loss,
        rounded.features_BTHD, rounded.expert_keys_ED}) {
    EXPECT_EQ(x.scalar_type(), at::kFloat);
  }
  EXPECT_FALSE(at::equal(full.logits_BTHE, rounded.logits_BTHE));
  EXPECT_TRUE(at::allclose(full.logits_BTHE, rounded.logits_BTHE, 0.1, 0.1));
}

class MixedPrecision : public testing::Test {
 protected:
  MixedPrecision() : traces_(TraceSynthesizer(3, 8, 24, 200, 5).Make(60, 6, 16, true)) {}
  SpeculationJob Job(const std::string& name, const std::string& kind = "hidden") const {
    SpeculationJob job;
    job.options.kind = kind;
    job.options.dtype = "bf16";
    job.options.steps = 24;
    job.options.global_batch = 8;
    job.options.micro_batch = 4;
    job.options.validate_every = 8;
    job.options.validation_sequences = job.options.test_sequences = 4;
    job.options.sizes = {16, 2, 32, 2, 0, 0.1};
    job.out = folder_.path() / name;
    job.quiet = true;
    return job;
  }
  std::string Weights(const SpeculationJob& job) const {
    return ReadFile(job.out / "model.safetensors");
  }
  TempFolder folder_;
  SyntheticTraces traces_;
};

double Mean(const std::vector<double>& losses, size_t begin, size_t end) {
  return std::accumulate(losses.begin() + int64_t(begin), losses.begin() + int64_t(end),
                         0.0) /
         double(end - begin);
}

// 120 steps: the last 20 losses' mean within 3 % of fp32's, well below the first 20's.
TEST_F(MixedPrecision, LearnsAsFp32DoesButNotInItsBits) {
  SpeculationJob bf16 = Job("bf16"), fp32 = Job("fp32");
  bf16.options.steps = fp32.options.steps = 120;
  bf16.options.validate_every = fp32.options.validate_every = 60;
  fp32.options.dtype = "fp32";
  const SpeculationResult rounded = Train(bf16, traces_), full = Train(fp32, traces_);
  ASSERT_EQ(rounded.losses.size(), 120u);
  const double end = Mean(rounded.losses, 100, 120);
  EXPECT_LT(end, 0.9 * Mean(rounded.losses, 0, 20));
  EXPECT_NEAR(end, Mean(full.losses, 100, 120), 0.03 * end);
  for (size_t i = 0; i < 120; ++i) EXPECT_NE(rounded.losses[i], full.losses[i]) << i;
  EXPECT_EQ(rounded.results["dtype"], "bf16");
  const double valid = rounded.results["validation"]["loss"];
  EXPECT_NEAR(valid, full.results["validation"]["loss"].get<double>(), 0.05 * valid);
}

TEST_F(MixedPrecision, WhatIsSavedIsFp32) {
  SpeculationJob job = Job("run");
  job.options.steps = 1;
  Train(job, traces_);
  EXPECT_THAT(Weights(job), testing::HasSubstr("\"F32\""));
  EXPECT_THAT(Weights(job), testing::Not(testing::HasSubstr("\"BF16\"")));
}

TEST_F(MixedPrecision, StopsAndGoesOnWithEqualBits) {
  for (const char* kind : {"hidden", "moe"}) {
    const SpeculationJob whole = Job(std::string("whole_") + kind, kind);
    const SpeculationResult expected = Train(whole, traces_);
    SpeculationJob parts = Job(std::string("parts_") + kind, kind);
    for (const int64_t stop : {3, 11}) {
      parts.stop_after = stop;
      EXPECT_THROW(Train(parts, traces_), StoppedError);
    }
    parts.stop_after = 0;
    const SpeculationResult result = Train(parts, traces_);
    EXPECT_EQ(Weights(parts), Weights(whole)) << kind;
    EXPECT_EQ(result.results.dump(), expected.results.dump());
  }
}

TEST_F(MixedPrecision, AnotherPrecisionIsAnotherRun) {
  SpeculationJob job = Job("run");
  job.stop_after = 3;
  EXPECT_THROW(Train(job, traces_), StoppedError);
  job.options.dtype = "fp32";
  EXPECT_THROW(Train(job, traces_), UsageError);
}

TEST(PrecisionOptionsTest, Fp16IsRefusedWithTheReasonAndTheFix) {
  SpeculationOptions options;
  options.dtype = "fp16";
  try {
    options.Validate();
    FAIL();
  } catch (const UsageError& e) {
    EXPECT_THAT(e.what(), testing::HasSubstr("scales the loss"));
    EXPECT_THAT(e.what(), testing::HasSubstr("--dtype=bf16"));
  }
  options.dtype = "fp8";
  EXPECT_THROW(options.Validate(), UsageError);
}

}  // namespace
}  // namespace routecast
