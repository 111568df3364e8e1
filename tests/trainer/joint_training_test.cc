// One trunk over the traces of several models: what is shared and what is not, that all
// of them are learnt, and that a run on one of them, or on another, goes on from the
// trunk.
#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/errors.h"
#include "models/joint_model.h"
#include "tests/storage/temp_folder.h"
#include "tests/trainer/synthetic_traces.h"
#include "trainer/speculation_size.h"

namespace routecast {
namespace {

SpeculationConfig ConfigFor(const MoeGeometry& geometry, const std::string& kind) {
  SpeculationConfig c = DefaultSpeculationConfig(kind, geometry, 0, 0);
  c.width = 16;
  c.heads = 2;
  c.ff = 32;
  c.layers = 2;
  return c;
}

RoutingWindow WindowFor(const MoeGeometry& geometry, int traced_model) {
  RoutingWindow w;
  w.source_layer = 0;
  w.num_layers = geometry.encoder_layers;
  w.num_experts = geometry.num_experts;
  w.token_ids_BT = at::zeros({2, 4}, at::kLong);
  w.valid_BT = at::ones({2, 4}, at::kBool);
  w.experts_BTL = at::arange(8 * w.num_layers).view({2, 4, -1}).remainder(w.num_experts);
  w.traced_model = traced_model;
  return w;
}

class JointModels : public testing::TestWithParam<const char*> {
 protected:
  const MoeGeometry small_{2, 0, 5, 1, 8}, large_{4, 3, 9, 1, 8};
  JointModel joint_{{ConfigFor(small_, GetParam()), ConfigFor(large_, GetParam())}, 3};
};
INSTANTIATE_TEST_SUITE_P(Kinds, JointModels,
                         testing::Values("interlayer", "moe", "autoregressive"),
                         [](const auto& info) { return std::string(info.param); });

TEST_P(JointModels, ShareTheTrunkAndNothingElse) {
  const Parameters &a = joint_.part(0).parameters(), &b = joint_.part(1).parameters();
  int shared = 0, own = 0;
  for (const auto& [name, tensor] : b.items()) {
    if (OfTracedModel(name)) {
      EXPECT_FALSE(tensor.is_same(a.Get(name))) << name;
      EXPECT_TRUE(tensor.is_same(joint_.parameters().Get("model.1." + name)));
      ++own;
    } else {
      EXPECT_TRUE(tensor.is_same(a.Get(name))) << name;
      ++shared;
    }
  }
  EXPECT_GT(own, 3);
  EXPECT_GT(shared, 20);
  EXPECT_EQ(joint_.parameters().items().size(), a.items().size() + size_t(own));
}

TEST_P(JointModels, AnswerAsThePartThatIsAsked) {
  const c10::NoGradGuard no_grad;
  for (int i = 0; i < 2; ++i) {
    const RoutingWindow w = WindowFor(i == 0 ? small_ : large_, i);
    const auto out = joint_.Forward(w, 0).logits_BTHE;
    EXPECT_TRUE(at::equal(out, joint_.part(size_t(i)).Forward(w, 0).logits_BTHE));
    EXPECT_EQ(out.size(3), w.num_experts);
  }
}

// A loss on one model's traces moves the trunk, and of the embeddings its own alone.
TEST_P(JointModels, GradientsReachTheTrunkAndTheOwnTables) {
  joint_.Forward(WindowFor(large_, 1), 0).logits_BTHE.square().sum().backward();
  const auto moved = [&](const Parameters& parameters, const std::string& name) {
    const at::Tensor& gradient = parameters.Get(name).grad();
    return gradient.defined() && gradient.abs().sum().item<double>() > 0;
  };
  EXPECT_TRUE(moved(joint_.part(0).parameters(), "layer.0.attention.q.weight"));
  EXPECT_TRUE(moved(joint_.part(1).parameters(), "expert.embedding"));
  EXPECT_FALSE(moved(joint_.part(0).parameters(), "expert.embedding"));
}

class JointTraining : public testing::Test {
 protected:
  JointTraining()
      : first_(TraceSynthesizer(3, 8, 24, 60, 5).Make(60, 6, 24, true)),
        second_(TraceSynthesizer(2, 12, 16, 60, 9).Make(40, 6, 24, true)),
        third_(TraceSynthesizer(4, 6, 16, 60, 7).Make(40, 6, 24, true)) {}
  SpeculationJob Job(const std::string& name) const {
    SpeculationJob job;
    job.options.kind = "interlayer";
    job.options.sizes = {16, 2, 32, 2, 0, 0};
    job.options.augment.masked_ids = 0.15;
    job.options.steps = 24;
    job.options.global_batch = 16;
    job.options.micro_batch = 8;
    job.options.validate_every = 8;
    job.options.validation_sequences = 8;
    job.options.test_sequences = 8;
    job.out = folder_.path() / name;
    job.quiet = true;
    return job;
  }
  // On `first`, and on `also` where it is there.
  static SpeculationResult Train(SpeculationJob job, const SyntheticTraces& first,
                                 const SyntheticTraces* also = nullptr) {
    TraceDataset dataset(first.traces, first.geometry);
    std::optional<TraceDataset> further;
    if (also) {
      further.emplace(also->traces, also->geometry);
      job.also.push_back({"second", &*further});
    }
    LocalCommunicator comm;
    return TrainSpeculation(job, &dataset, first.routers, &comm);
  }
  static std::string Refusal(const SpeculationJob& job, const SyntheticTraces& first,
                             const SyntheticTraces* also) {
    try {
      Train(job, first, also);
    } catch (const UsageError& e) {
      EXPECT_LE(std::count(e.what(), e.what() + std::strlen(e.what()), '\n'), 2);
      EXPECT_FALSE(fs::exists(job.out)) << "something was done before";
      return e.what();
    }
    return "nothing was refused";
  }
  TempFolder folder_;
  const SyntheticTraces first_, second_, third_;
};

TEST_F(JointTraining, EveryModelIsLearntAndKept) {
  SpeculationJob job = Job("joint");
  job.options.steps = 120;
  job.options.training.learning_rate = 5e-3;
  const SpeculationResult result = Train(job, first_, &second_);
  EXPECT_LT(result.results["validation"]["loss"], std::log(8.0));
  ASSERT_EQ(result.results["also"].size(), 1u);
  EXPECT_EQ(result.results["also"][0]["store"], "second");
  EXPECT_LT(result.results["also"][0]["validation"]["loss"], std::log(12.0));
  const auto kept = LoadSpeculationModel(job.out);
  const auto other = LoadSpeculationModel(job.out / "also-1");
  EXPECT_EQ(kept.model->config().geometry, first_.geometry);
  EXPECT_EQ(other.model->config().geometry, second_.geometry);
  for (const auto& [name, tensor] : other.model->parameters().items()) {
    if (OfTracedModel(name)) continue;
    EXPECT_TRUE(at::equal(tensor, kept.model->parameters().Get(name))) << name;
  }
  EXPECT_TRUE(fs::exists(job.out / "also-1" / "baselines.safetensors"));
  const auto traces_of = [](const fs::path& folder) {
    return Json::parse(ReadFile(folder / "config.json")).at("extra").at("traces");
  };
  EXPECT_NE(traces_of(job.out), traces_of(job.out / "also-1"));
}

TEST_F(JointTraining, ARunOnAnotherModelGoesOnFromTheTrunk) {
  const SpeculationJob joint = Job("joint");
  Train(joint, first_, &second_);
  SpeculationJob next = Job("next");
  next.options.sizes = {};
  next.options.start_from = joint.out.string();
  next.options.transfer = true;
  next.options.training.learning_rate = 1e-12;
  next.options.steps = 1;
  Train(next, third_);
  const auto trunk = LoadSpeculationModel(joint.out),
             grown = LoadSpeculationModel(next.out);
  const std::string inner = "layer.1.in.weight";
  EXPECT_TRUE(at::allclose(grown.model->parameters().Get(inner),
                           trunk.model->parameters().Get(inner), 0, 1e-6));
  EXPECT_EQ(grown.model->config().geometry, third_.geometry);
}

TEST_F(JointTraining, StoppedItGoesOnWithEqualBits) {
  SpeculationJob whole = Job("whole"), parts = Job("parts");
  whole.options.ema = parts.options.ema = 0.9;
  const auto expected = Train(whole, first_, &second_);
  for (const int64_t stop : {5, 16}) {
    parts.stop_after = stop;
    EXPECT_THROW(Train(parts, first_, &second_), StoppedError);
  }
  parts.stop_after = 0;
  EXPECT_EQ(Train(parts, first_, &second_).results.dump(), expected.results.dump());
  for (const char* file : {"model.safetensors", "also-1/model.safetensors"}) {
    EXPECT_TRUE(ReadFile(parts.out / file) == ReadFile(whole.out / file)) << file;
  }
  // Another further store is another run.
  parts.stop_after = 3;
  parts.out = folder_.path() / "third";
  EXPECT_THROW(Train(parts, first_, &second_), StoppedError);
  EXPECT_THROW(Train(parts, first_, &third_), UsageError);
}

TEST_F(JointTraining, TheSizeCountsEveryTableOnce) {
  TraceDataset first(first_.traces, first_.geometry),
      second(second_.traces, second_.geometry);
  const SpeculationOptions options = Job("x").options;
  const SpeculationSize one = SizeOf(options, &first);
  const SpeculationSize both = SizeOf(options, &first, {{"second", &second}});
  const SpeculationSize other = SizeOf(options, &second);
  EXPECT_GT(both.parameters, one.parameters);
  EXPECT_LT(both.parameters, one.parameters + other.parameters);
  EXPECT_GT(both.windows_per_epoch, one.windows_per_epoch);
}

TEST_F(JointTraining, WhatCannotShareIsRefusedBeforeAnythingIsDone) {
  SpeculationJob job = Job("x");
  job.options.curriculum_epochs = 2;
  EXPECT_THAT(Refusal(job, first_, &second_), testing::HasSubstr("--curriculum_epochs"));
  job = Job("x");
  job.options.kind = "ensemble";
  job.options.sizes = {};
  EXPECT_THAT(Refusal(job, first_, &second_), testing::HasSubstr("does not embed"));
  job.options.augment.masked_ids = 0;
  job.options.kind = "hidden";
  EXPECT_THAT(Refusal(job, first_, &second_), testing::HasSubstr("does not embed"));
}

}  // namespace
}  // namespace routecast
