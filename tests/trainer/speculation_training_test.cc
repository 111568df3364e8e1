// Training in a world of one: it learns what is there, stops and goes on with equal bits,
// and refuses data that disagree.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <sstream>

#include "common/errors.h"
#include "models/predictor_factory.h"
#include "models/speculation_onnx.h"
#include "tests/trainer/synthetic_traces.h"
#include "trainer/speculation_trainer.h"

namespace routecast {
namespace {

class SpeculationTraining : public testing::Test {
 protected:
  SpeculationTraining() {
    folder_ =
        fs::path(testing::TempDir()) /
        ("speculation_" +
         std::string(testing::UnitTest::GetInstance()->current_test_info()->name()));
    fs::remove_all(folder_);
    fs::create_directories(folder_);
  }
  ~SpeculationTraining() override { fs::remove_all(folder_); }

  SyntheticTraces Traces(int sequences) {
    return TraceSynthesizer(/*layers=*/3, /*experts=*/8, /*width=*/24,
                            /*vocabulary=*/200, /*seed=*/5)
        .Make(sequences, 6, 24, /*every_hidden=*/false);
  }
  SpeculationJob Job(const std::string& name, const std::string& kind = "hidden") {
    SpeculationJob job;
    job.options.kind = kind;
    job.options.steps = 24;
    job.options.global_batch = 16;
    job.options.micro_batch = 4;
    job.options.validate_every = 8;
    job.options.log_every = 5;
    job.options.validation_sequences = 8;
    job.options.test_sequences = 8;
    job.out = folder_ / name;
    job.quiet = true;
    return job;
  }
  SpeculationResult Train(const SpeculationJob& job, const SyntheticTraces& s) {
    TraceDataset dataset(s.traces, s.geometry);
    LocalCommunicator comm;
    return TrainSpeculation(job, &dataset, s.routers, &comm);
  }
  std::string Weights(const SpeculationJob& job) {
    return ReadFile(job.out / "model.safetensors");
  }
  fs::path folder_;
};

TEST_F(SpeculationTraining, StopsAndGoesOnWithEqualBits) {
  const SyntheticTraces traces = Traces(60);
  for (const char* kind : {"hidden", "interlayer"}) {
    const SpeculationJob whole = Job(std::string("whole_") + kind, kind);
    const SpeculationResult expected = Train(whole, traces);
    SpeculationJob parts = Job(std::string("parts_") + kind, kind);
    for (const int64_t stop : {3, 11, 19}) {  // before, between and after validations
      parts.stop_after = stop;
      EXPECT_THROW(Train(parts, traces), StoppedError);
    }
    parts.stop_after = 0;
    const SpeculationResult result = Train(parts, traces);
    EXPECT_EQ(Weights(parts), Weights(whole)) << kind;
    EXPECT_EQ(result.results.dump(), expected.results.dump());
    ASSERT_EQ(result.losses.size(), 5u) << "steps 20 to 24";
    EXPECT_TRUE(std::equal(result.losses.begin(), result.losses.end(),
                           expected.losses.begin() + 19));
    EXPECT_FALSE(fs::exists(parts.out / "state"));
  }
}

// Everything that a checkpoint has to hold: members' moments, averages, what the plateau
// counted; and everything that must be a function of the step: drops, masks, parts.
TEST_F(SpeculationTraining, AnEnsembleWithAllOptionsGoesOnWithEqualBits) {
  const SyntheticTraces traces = Traces(60);
  const auto configure = [&](const std::string& name) {
    SpeculationJob job = Job(name, "ensemble");
    job.options.members =
        "interlayer*2:width=16,heads=2,layers=1,lr=2e-3;hidden:width=16,heads=2,clip=0.1";
    job.options.schedule.name = "plateau";
    job.options.schedule.plateau_patience = 1;
    job.options.ema = 0.9;
    job.options.set_weight = 0.1;
    job.options.monitor = "top1";
    job.options.validate_every = 4;
    job.options.augment = {0.2, 0.3, 0.1, 0.15, 0.5};
    job.options.curriculum_epochs = 2;
    return job;
  };
  const SpeculationJob whole = configure("whole");
  const SpeculationResult expected = Train(whole, traces);
  SpeculationJob parts = configure("parts");
  for (const int64_t stop : {3, 10, 19}) {
    parts.stop_after = stop;
    EXPECT_THROW(Train(parts, traces), StoppedError);
  }
  parts.stop_after = 0;
  const SpeculationResult result = Train(parts, traces);
  EXPECT_EQ(Weights(parts), Weights(whole));
  EXPECT_EQ(result.results.dump(), expected.results.dump());
  // Members are weighed by validation, and each is scored alone.
  EXPECT_EQ(expected.results["members"].size(), 3u);
  const auto saved = LoadSpeculationModel(whole.out);
  double sum = 0;
  for (const double w : saved.model->config().weights) sum += w;
  EXPECT_NEAR(sum, 1, 1e-9);
}

class EveryKindTrains : public SpeculationTraining,
                        public testing::WithParamInterface<std::string> {};
INSTANTIATE_TEST_SUITE_P(Kinds, EveryKindTrains, testing::ValuesIn(SpeculationKinds()),
                         [](const auto& info) { return info.param; });

TEST_P(EveryKindTrains, WithoutNaNAndIsServed) {
  const SyntheticTraces traces = Traces(40);
  SpeculationJob job = Job("run", GetParam());
  job.out = folder_.string() + "_" + GetParam();
  job.options.steps = 8;
  job.options.sizes = {16, 2, 32, 1, 0, -1};
  if (GetParam() == "contextual" || GetParam() == "transformer" ||
      GetParam() == "hierarchical") {
    job.options.sizes = {24, 2, 32, 1, 0, -1};  // the width is the state's
  }
  const SpeculationResult result = Train(job, traces);
  for (const double loss : result.losses) EXPECT_TRUE(std::isfinite(loss));
  EXPECT_EQ(result.results["scores"].size(), 3u + 2 + 1 + 4 * 3);
  EXPECT_EQ(result.results["sets"].size(), 3u + 2 + 1);
  const auto predictor = LoadPredictor(job.out.string(), traces.geometry, "", {});
  RoutingWindow window = WindowOf(traces.traces[0], Stack::kDecoder, 1, 8);
  if (!predictor->needs_hidden()) ForgetRouterInputs(&window);
  const auto probs = *predictor->Predict(window, 1);
  EXPECT_TRUE(at::allclose(probs.sum(-1), at::ones_like(probs.sum(-1)), 1e-4, 1e-4));
  fs::remove_all(job.out);
}

TEST_P(EveryKindTrains, AStepInBf16WithoutNaN) {
  SpeculationJob job = Job("run", GetParam());
  job.out = folder_.string() + "_" + GetParam() + "_bf16";
  job.options.dtype = "bf16";
  job.options.steps = 1;
  job.options.global_batch = 4;
  job.options.validation_sequences = job.options.test_sequences = 2;
  job.options.sizes = {24, 2, 32, 1, 0, 0.1};
  const auto train = [&] {
    const SpeculationResult result = Train(job, Traces(20));
    EXPECT_TRUE(std::isfinite(result.losses.at(0)));
    EXPECT_TRUE(std::isfinite(result.results["validation"]["loss"].get<double>()));
    LoadSpeculationModel(job.out);  // throws where a weight is not finite
    fs::remove_all(job.out);
  };
  train();
  if (GetParam() == "ensemble") return;
  job.options.kind = "ensemble";  // two of it in one set of layers
  job.options.members = GetParam() + "*2:width=24,heads=2,ff=32,layers=1,dropout=0.1";
  job.options.sizes = {};
  train();
}

TEST_F(SpeculationTraining, StartsFromTheWeightsOfAnotherRun) {
  const SyntheticTraces traces = Traces(60);
  SpeculationJob first = Job("first");
  first.options.steps = 60;
  Train(first, traces);
  SpeculationJob more = Job("more");
  more.options.steps = 1;
  more.options.start_from = first.out;
  SpeculationJob fresh = more;
  fresh.out = folder_ / "fresh";
  fresh.options.start_from.clear();
  const double started = Train(more, traces).losses.front();
  EXPECT_LT(started, Train(fresh, traces).losses.front() - 0.1);
  // Bits survive a stop, as for any other run.
  more.options.steps = 6;
  SpeculationJob parts = more;
  more.out = folder_ / "whole";
  parts.out = folder_ / "parts";
  Train(more, traces);
  parts.stop_after = 2;
  EXPECT_THROW(Train(parts, traces), StoppedError);
  parts.stop_after = 0;
  Train(parts, traces);
  EXPECT_TRUE(Weights(parts) == Weights(more));
}

TEST_F(SpeculationTraining, AStoreOfFewerTokenIdsIsGoneOnWith) {
  SyntheticTraces traces = Traces(40);
  SpeculationJob first = Job("first");
  first.options.steps = 2;
  Train(first, traces);
  const int known = LoadSpeculationModel(first.out).model->config().vocab_size;
  for (RoutingTrace& trace : traces.traces) {
    for (RoutingSpan* span : {&trace.encoder, &trace.decoder}) {
      for (uint32_t& id : span->token_ids) id %= 50;
    }
  }
  SpeculationJob more = Job("more");
  more.options.steps = 1;
  more.options.start_from = first.out;
  EXPECT_EQ(Train(more, traces).losses.size(), 1u);
  EXPECT_EQ(LoadSpeculationModel(more.out).model->config().vocab_size, known);
}

// It answers without a state, too: before any layer, and where none was recorded.
TEST_F(SpeculationTraining, AdaptiveIsMeasuredWhereverItAnswers) {
  SpeculationJob job = Job("run", "interlayer");
  job.options.sizes = {16, 2, 24, 1, 0, -1};
  job.options.steps = 1;
  const Json baselines = Train(job, Traces(40)).results["baselines"];
  const Json &adaptive = baselines["adaptive"], &pattern = baselines["pattern"];
  ASSERT_EQ(adaptive.size(), pattern.size());
  for (size_t i = 0; i < pattern.size(); ++i) {
    EXPECT_EQ(adaptive[i]["samples"], pattern[i]["samples"]) << pattern[i];
  }
}

TEST_F(SpeculationTraining, ATimeThatEndsWithTheLastStepStopsNothing) {
  SpeculationJob job = Job("run", "simple");
  job.options.steps = 1;
  job.time_limit = 1e-9;
  Train(job, Traces(40));
  EXPECT_FALSE(ReadJsonFile(job.out / "config.json")["extra"].contains("time_limit"));
}

TEST_F(SpeculationTraining, ARunThatIsGoneOnWithMaySayLaterUseToo) {
  const SyntheticTraces traces = Traces(40);
  const SpeculationJob first = Job("first");
  Train(first, traces);
  SpeculationJob more = Job("more");
  more.options.steps = 1;
  more.options.start_from = first.out;
  more.options.later_use = true;
  Train(more, traces);
  EXPECT_TRUE(LoadSpeculationModel(more.out).model->config().later_use);
  SpeculationJob on = Job("on");  // keeps what it has
  on.options.steps = 1;
  on.options.start_from = more.out;
  Train(on, traces);
  EXPECT_TRUE(LoadSpeculationModel(on.out).model->config().later_use);
  SpeculationJob other = Job("other", "interlayer");
  other.options.later_use = true;
  EXPECT_THROW(other.options.Validate(), UsageError);
}

TEST_F(SpeculationTraining, RefusesToStartFromWhatDoesNotFit) {
  const SyntheticTraces traces = Traces(40);
  const SpeculationJob first = Job("first");
  Train(first, traces);
  SpeculationJob other = Job("other", "interlayer");
  other.options.start_from = first.out;
  EXPECT_THROW(Train(other, traces), UsageError);
  other = Job("other");
  other.options.start_from = folder_ / "nowhere";
  EXPECT_THROW(Train(other, traces), UsageError);
  other.options.start_from = first.out;
  other.options.sizes.width = 32;
  EXPECT_THROW(other.options.Validate(), UsageError);
}

// How members are combined is the run's own, as its sizes are.
TEST_F(SpeculationTraining, RefusesToStartFromAnotherMixture) {
  const SyntheticTraces traces = Traces(40);
  SpeculationJob first = Job("first", "ensemble");
  first.options.steps = 1;
  first.options.members = "interlayer*2:width=8,heads=2,ff=8,layers=1";
  Train(first, traces);
  SpeculationJob more = Job("more", "ensemble");
  more.options.steps = 1;
  more.options.start_from = first.out;
  more.options.combine = "stack";
  EXPECT_THROW(Train(more, traces), UsageError);
  more.options.combine = "probabilities";
  EXPECT_EQ(Train(more, traces).losses.size(), 1u);
}

TEST_F(SpeculationTraining, RefusesAnotherConfigurationInTheSameFolder) {
  const SyntheticTraces traces = Traces(60);
  SpeculationJob job = Job("run");
  job.stop_after = 4;
  EXPECT_THROW(Train(job, traces), StoppedError);
  job.options.seed = 2;
  EXPECT_THROW(Train(job, traces), UsageError);
  job.resume = "never";
  EXPECT_THROW(Train(job, traces), StoppedError) << "starts anew";
  job.resume = (folder_ / "nothing").string();
  EXPECT_THROW(Train(job, traces), UsageError);
}

TEST_F(SpeculationTraining, TheMetricsOfAStoppedRunReadLikeThoseOfAWholeOne) {
  const SyntheticTraces traces = Traces(60);
  SpeculationJob job = Job("run");
  job.stop_after = 13;
  EXPECT_THROW(Train(job, traces), StoppedError);
  job.stop_after = 0;
  Train(job, traces);
  std::vector<int64_t> steps, validations;
  std::istringstream lines(ReadFile(job.out / "metrics.jsonl"));
  for (std::string line; std::getline(lines, line);) {
    const Json json = ParseJson(line, "metrics.jsonl");
    (json.contains("valid_loss") ? validations : steps).push_back(json["step"]);
    if (json.contains("valid_loss")) continue;
    EXPECT_GT(json["waiting_for_data"], 0);
    EXPECT_LT(json["waiting_for_data"], 1);
  }
  EXPECT_THAT(steps, testing::ElementsAre(5, 10, 15, 20, 24));
  EXPECT_THAT(validations, testing::ElementsAre(8, 16, 24));
}

TEST_F(SpeculationTraining, LearnsMoreThanTheBaselinesFromRouterInputs) {
  const SyntheticTraces traces = Traces(500);
  SpeculationJob job = Job("run");
  job.options.steps = 400;
  job.options.validate_every = 100;
  job.options.validation_sequences = 0;
  job.options.test_sequences = 0;
  const Json results = Train(job, traces).results;
  EXPECT_EQ(results["stale_gate_control"]["accuracy"], 1.0);
  EXPECT_GT(results["stale_gate_control"]["tokens"], 100);
  EXPECT_EQ(results["scores"].size(), 3u + 2 + 1 + 4 * 3);  // leads by source
  int compared = 0;
  for (const auto& [name, entries] : results["baselines"].items()) {
    for (const Json& b : entries) {
      for (const Json& s : results["scores"]) {
        if (s["phase"] != b["phase"] || s["layer"] != b["layer"] ||
            s["lead"] != b["lead"]) {
          continue;
        }
        EXPECT_EQ(s["samples"], b["samples"]);
        // Before the first layer the token alone is known; the next token is random here.
        if (s["layer"].get<int>() < 0 ||
            s["layer"].get<int>() + s["lead"].get<int>() > 2) {
          continue;
        }
        EXPECT_GT(s["top1"].get<double>(), b["top1"].get<double>()) << name << " " << b;
        ++compared;
      }
    }
  }
  EXPECT_GE(compared, 5 * 6);
  // What it wrote is what the evaluator loads.
  const auto predictor = LoadPredictor(job.out.string(), traces.geometry,
                                       job.out / "baselines.safetensors", {});
  EXPECT_TRUE(predictor->needs_hidden());
  LoadPredictor("markov", traces.geometry, job.out / "baselines.safetensors", {});
}

TEST_F(SpeculationTraining, RefusesToScoreWhenTheStaleGateControlFails) {
  SyntheticTraces traces = Traces(60);
  for (RoutingTrace& t : traces.traces) {
    if (SplitOf(t.group_id) != SplitPart::kValidation || t.decoder.hidden.empty())
      continue;
    // One token's state becomes its opposite: its choice cannot be the same.
    for (int d = 0; d < t.decoder.hidden_width; ++d) {
      t.decoder.hidden[static_cast<size_t>(d)] ^= 0x8000;
    }
  }
  EXPECT_THROW(Train(Job("run"), traces), DataError);
}

TEST_F(SpeculationTraining, WritesOnnxWhereAskedTo) {
  const SyntheticTraces traces = Traces(20);
  SpeculationJob job = Job("onnx", "interlayer");
  job.options.steps = 1;
  job.onnx = true;
  Train(job, traces);
  const auto saved = LoadSpeculationModel(job.out).model;
  EXPECT_EQ(ReadFile(job.out / "onnx" / "decoder-1.onnx"),
            SpeculationOnnx(*saved, Stack::kDecoder, 1));
}

TEST_F(SpeculationTraining, RefusesOnnxOfAKindWithoutBeforeItStarts) {
  SpeculationJob job = Job("onnx", "moe");
  job.onnx = true;
  EXPECT_THROW(Train(job, Traces(20)), UsageError);
  EXPECT_FALSE(fs::exists(job.out));
}

TEST_F(SpeculationTraining, SaysWhatAStoreWithoutRouterInputsLacks) {
  SyntheticTraces traces = Traces(60);
  for (RoutingTrace& t : traces.traces) {
    for (RoutingSpan* span : {&t.encoder, &t.decoder}) {
      span->hidden.clear();
      span->hidden_width = 0;
    }
  }
  EXPECT_THROW(Train(Job("run"), traces), UsageError);
  SpeculationJob ids = Job("ids", "interlayer");
  ids.options.steps = 2;
  Train(ids, traces);  // ids are enough for this one
}

}  // namespace
}  // namespace routecast
