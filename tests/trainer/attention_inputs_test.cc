// Attention summaries as an input of `hidden`: what the model is made of, that it reads
// them and no later token's, that a run is resumed to the bit, and what is refused.
#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "common/errors.h"
#include "models/predictor_factory.h"
#include "models/speculation_onnx.h"
#include "tests/storage/temp_folder.h"
#include "tests/trainer/synthetic_traces.h"
#include "trainer/leaderboard.h"

namespace routecast {
namespace {

constexpr int kHeads = 2;

SyntheticTraces Traces(int heads) {
  return TraceSynthesizer(3, 8, 24, 60, 5)
      .Make(60, 6, 24, /*every_hidden=*/false, /*top_k=*/0, heads);
}

SpeculationConfig Config(int heads) {
  SpeculationConfig c =
      DefaultSpeculationConfig("hidden", MoeGeometry{3, 3, 8, 1, 24}, 60, 24);
  c.width = 16;
  c.heads = 2;
  c.ff = 24;
  c.attention_heads = heads;
  return c;
}

int64_t ParametersOf(int heads) {
  return MakeSpeculationModel(Config(heads), 1)->parameters().num_elements();
}

// A map of the entropies and one of the tokens' embeddings (64) a source layer: 2 of the
// encoder, 3 of the decoder, which has as many heads again over the encoder.
TEST(AttentionInputs, AddTwoMapsASourceLayer) {
  const auto maps = [](int heads) { return (heads + 1) * 16 + (64 * heads + 1) * 16; };
  EXPECT_EQ(ParametersOf(kHeads) - ParametersOf(0),
            2 * maps(kHeads) + 3 * maps(2 * kHeads));
}

TEST(AttentionInputs, OfAConfigurationAreReadWhereTheyAreSaid) {
  EXPECT_FALSE(Config(0).ToJson().contains("attention_heads"));  // as files before them
  EXPECT_EQ(Config(0), SpeculationConfig::FromJson(Config(0).ToJson(), "x"));
  EXPECT_EQ(Config(kHeads), SpeculationConfig::FromJson(Config(kHeads).ToJson(), "x"));
  SpeculationConfig c = Config(kHeads);
  c.kind = "interlayer";
  EXPECT_THROW(SpeculationConfig::FromJson(c.ToJson(), "x"), DataError);
  c = Config(kHeads);
  c.hidden_width = 0;
  EXPECT_THROW(SpeculationConfig::FromJson(c.ToJson(), "x"), DataError);
  EXPECT_THROW(SpeculationConfig::FromJson(Config(5000).ToJson(), "x"), DataError);
}

RoutingWindow Window(const SyntheticTraces& traces, Stack stack, int source) {
  return WindowsOf({&traces.traces[0], &traces.traces[2]}, stack, source, 8);
}

TEST(AttentionInputs, AreReadAtTheOwnTokenAndBeforeIt) {
  const c10::NoGradGuard no_grad;
  const SyntheticTraces traces = Traces(kHeads);
  const auto model = MakeSpeculationModel(Config(kHeads), 7);
  for (const Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
    for (int source = 0; source < (stack == Stack::kEncoder ? 2 : 3); ++source) {
      const RoutingWindow window = Window(traces, stack, source);
      const auto expected = model->Forward(window, 0).logits_BTHE;
      const int64_t T = window.token_ids_BT.size(1);
      for (const int64_t t : {int64_t{0}, int64_t{2}}) {
        RoutingWindow entropies = window, ids = window;
        entropies.attention_entropy_BTA = window.attention_entropy_BTA.clone();
        entropies.attention_entropy_BTA.narrow(1, t + 1, T - t - 1).add_(1);
        ids.attended_ids_BTAK = window.attended_ids_BTAK.clone();
        ids.attended_ids_BTAK.narrow(1, t + 1, T - t - 1).add_(2).remainder_(60);
        for (const RoutingWindow& changed : {entropies, ids}) {
          const auto got = model->Forward(changed, 0).logits_BTHE;
          EXPECT_TRUE(at::equal(got.narrow(1, 0, t + 1), expected.narrow(1, 0, t + 1)));
          EXPECT_FALSE(at::allclose(got.select(1, t + 1), expected.select(1, t + 1)));
        }
      }
    }
  }
}

// What the newest token is told is what it is told among all tokens.
TEST(AttentionInputs, OfTheLastTokenAloneAreTheSame) {
  const c10::NoGradGuard no_grad;
  const SyntheticTraces traces = Traces(kHeads);
  const auto model = MakeSpeculationModel(Config(kHeads), 7);
  const RoutingWindow window = WindowOf(traces.traces[0], Stack::kDecoder, 1, 8);
  const auto all = model->Forward(window, 0).logits_BTHE;
  const auto last = model->ForwardLast(window).logits_BTHE;
  EXPECT_TRUE(at::allclose(last.select(1, 0), all.select(1, all.size(1) - 1)));
}

TEST(AttentionInputs, OfMembersTogetherAreThoseOfEachAlone) {
  const c10::NoGradGuard no_grad;
  const RoutingWindow window = Window(Traces(kHeads), Stack::kDecoder, 1);
  const auto both = KindOf("hidden").make(Config(kHeads), {5, 6})->Forward(window, 0);
  for (int64_t m = 0; m < 2; ++m) {
    const auto alone = MakeSpeculationModel(Config(kHeads), uint64_t(5 + m));
    EXPECT_TRUE(at::allclose(both.logits_BTHE.narrow(0, 2 * m, 2),
                             alone->Forward(window, 0).logits_BTHE, 1e-5, 1e-5));
  }
}

TEST(AttentionInputs, AreNeverSilentlyMissing) {
  RoutingWindow window = Window(Traces(0), Stack::kDecoder, 1);
  const auto model = MakeSpeculationModel(Config(kHeads), 7);
  EXPECT_THROW(model->Forward(window, 0), std::logic_error);
}

// A part of a sequence takes its rows along; a token that is hidden hides its own.
TEST(AttentionInputs, MoveWithWhatAugmentationMoves) {
  const SyntheticTraces traces = Traces(kHeads);
  SpeculationBatch batch;
  batch.window = WindowOf(traces.traces[0], Stack::kEncoder, 1, 8);
  const RoutingWindow before = batch.window;
  const int64_t T = before.token_ids_BT.size(1);
  ASSERT_GT(T, 8);
  batch.window.token_ids_BT = at::arange(T).unsqueeze(0);  // says where a token was
  batch.labels_BTH = at::ones({1, T, 1}, at::kLong);
  batch.documents_BT = at::ones({1, T}, at::kLong);
  AugmentOptions options;
  options.subsequence = 1;
  options.mask = 0.3;
  bool moved = false;
  int hidden = 0, kept = 0;
  for (uint64_t key = 1; key < 9; ++key) {
    SpeculationBatch part = batch;
    for (at::Tensor* x : {&part.labels_BTH, &part.documents_BT}) *x = x->clone();
    Augment(options, key, &part);
    const RoutingWindow& w = part.window;
    for (int64_t t = 0; t < T; ++t) {
      const auto ids = w.attended_ids_BTAK[0][t];
      const int64_t from = w.token_ids_BT[0][t].item<int64_t>();
      if (!w.valid_BT[0][t].item<bool>() || w.experts_BTL[0][t][0].item<int64_t>() == 8) {
        EXPECT_TRUE(ids.eq(-1).all().item<bool>());
        EXPECT_TRUE(w.attention_entropy_BTA[0][t].eq(0).all().item<bool>());
        ++hidden;
        continue;
      }
      EXPECT_TRUE(at::equal(ids, before.attended_ids_BTAK[0][from]));
      EXPECT_TRUE(at::equal(w.attention_entropy_BTA[0][t],
                            before.attention_entropy_BTA[0][from]));
      moved = moved || from != t;
      ++kept;
    }
  }
  EXPECT_TRUE(moved);
  EXPECT_GT(std::min(hidden, kept), 5);
}

class AttentionTraining : public testing::Test {
 protected:
  SpeculationJob Job(const std::string& name) const {
    SpeculationJob job;
    job.options.sizes = {16, 2, 24, 1, 0, 0.1};
    job.options.attention_inputs = true;
    job.options.steps = 12;
    job.options.validate_every = 5;
    job.options.global_batch = 16;
    job.options.micro_batch = 8;
    job.options.validation_sequences = job.options.test_sequences = 8;
    job.out = folder_.path() / name;
    job.quiet = true;
    return job;
  }
  static SpeculationResult Train(const SpeculationJob& job, const SyntheticTraces& s) {
    TraceDataset dataset(s.traces, s.geometry);
    LocalCommunicator comm;
    return TrainSpeculation(job, &dataset, s.routers, &comm);
  }
  // The text of the UsageError that `run` ends with.
  template <typename Run>
  static std::string Refusal(const Run& run) {
    try {
      run();
    } catch (const UsageError& e) {
      EXPECT_LE(std::count(e.what(), e.what() + std::strlen(e.what()), '\n'), 2);
      return e.what();
    }
    return "nothing was refused";
  }
  std::string RefusalOf(const SpeculationJob& job, int heads) const {
    const std::string text = Refusal([&] { Train(job, Traces(heads)); });
    EXPECT_FALSE(fs::exists(job.out)) << "something was done before";
    return text;
  }
  TempFolder folder_;
};

TEST_F(AttentionTraining, StopsAndGoesOnWithEqualBits) {
  const SyntheticTraces traces = Traces(kHeads);
  const SpeculationResult expected = Train(Job("whole"), traces);
  SpeculationJob parts = Job("parts");
  for (const int64_t stop : {3, 7}) {
    parts.stop_after = stop;
    EXPECT_THROW(Train(parts, traces), StoppedError);
  }
  parts.stop_after = 0;
  EXPECT_EQ(Train(parts, traces).results.dump(), expected.results.dump());
  EXPECT_EQ(ReadFile(parts.out / "model.safetensors"),
            ReadFile(folder_.path() / "whole" / "model.safetensors"));
}

TEST_F(AttentionTraining, ChangesWhatAStepLearns) {
  const SyntheticTraces traces = Traces(kHeads);
  SpeculationJob plain = Job("plain");
  plain.options.attention_inputs = false;
  const auto losses = Train(plain, traces).losses;
  EXPECT_NE(Train(Job("with"), traces).losses, losses);
  // Without the option nothing of them is read, wherever they lie.
  plain.out = folder_.path() / "bare";
  EXPECT_EQ(Train(plain, Traces(0)).losses, losses);
}

TEST_F(AttentionTraining, HasItsLineInTheLeaderboardAndIsOfflineOnly) {
  const SyntheticTraces traces = Traces(kHeads);
  LeaderboardJob job;
  job.run = Job("board");
  job.run.options.steps = 2;
  job.entries = {"hidden"};
  job.seeds = 1;
  TraceDataset dataset(traces.traces, traces.geometry);
  LocalCommunicator comm;
  const Json board = MakeLeaderboard(job, &dataset, traces.routers, &comm);
  const Json& rows = board["rows"];
  const auto row = std::find_if(rows.begin(), rows.end(), [](const Json& r) {
    return r["kind"] == "hidden + attention";
  });
  ASSERT_NE(row, rows.end());
  EXPECT_TRUE((*row)["offline_only"].get<bool>());
  EXPECT_GT((*row)["predict_us"].get<double>(), 0);
  const fs::path run = job.run.out / "hidden" / "seed-1";
  EXPECT_THAT(Refusal([&] { LoadPredictor(run.string(), traces.geometry, "", {}); }),
              testing::AllOf(testing::HasSubstr("offline only"),
                             testing::HasSubstr("--attention_inputs")));
}

// The same documents, recorded without attention: no question could be asked.
TEST_F(AttentionTraining, IsNoEntryWhereAttentionIsNotRecorded) {
  SpeculationJob run = Job("run");
  run.options.steps = 2;
  Train(run, Traces(kHeads));
  LeaderboardJob job;
  job.run = Job("board");
  job.run.options.attention_inputs = false;
  job.entries = {"interlayer", run.out.string()};
  const SyntheticTraces bare = Traces(0);
  TraceDataset dataset(bare.traces, bare.geometry);
  LocalCommunicator comm;
  EXPECT_THAT(Refusal([&] { MakeLeaderboard(job, &dataset, bare.routers, &comm); }),
              testing::HasSubstr("attention"));
  EXPECT_FALSE(fs::exists(job.run.out)) << "something was trained before";
}

TEST_F(AttentionTraining, IsRefusedBeforeTheFirstStepWhereItCannotBe) {
  EXPECT_THAT(RefusalOf(Job("none"), 0),
              testing::HasSubstr("--record=ids,hidden,attention"));
  SpeculationJob other = Job("other");
  other.options.kind = "interlayer";
  EXPECT_THAT(RefusalOf(other, kHeads), testing::HasSubstr("--kind=hidden"));
  SpeculationJob onnx = Job("onnx");
  onnx.onnx = true;
  EXPECT_THAT(RefusalOf(onnx, kHeads), testing::HasSubstr("--attention_inputs"));
}

TEST_F(AttentionTraining, GoesOnFromARunOfAsManyHeads) {
  SpeculationJob first = Job("first");
  first.options.steps = 2;
  Train(first, Traces(kHeads));
  SpeculationJob next = Job("next");
  next.options.sizes = {};
  next.options.steps = 2;
  next.options.start_from = first.out.string();
  EXPECT_EQ(Train(next, Traces(kHeads)).losses.size(), 2u);
  next.out = folder_.path() / "refused";
  EXPECT_THAT(RefusalOf(next, 3), testing::HasSubstr("of 2 heads, this run of 3"));
  next.options.attention_inputs = false;
  EXPECT_THAT(RefusalOf(next, kHeads), testing::HasSubstr("this run of 0"));
}

}  // namespace
}  // namespace routecast
