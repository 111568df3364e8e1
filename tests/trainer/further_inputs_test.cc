// Token ids, router inputs and the router's likeliest experts as inputs of kinds that
// usually have none of them: what they add to a model, that it reads them at their place
// and no later, training, files, and what is refused.
#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "models/expert_slots.h"
#include "models/predictor_factory.h"
#include "models/speculation_onnx.h"
#include "tests/storage/temp_folder.h"
#include "tests/trainer/training_in_memory.h"

namespace routecast {
namespace {

constexpr int kExperts = 8, kWidth = 24, kVocabulary = 60, kTopK = 3;

SyntheticTraces Traces(int top_k = kTopK, bool hidden = true) {
  SyntheticTraces made = TraceSynthesizer(3, kExperts, kWidth, kVocabulary, 5)
                             .Make(60, 6, 24, /*every_hidden=*/true, top_k);
  for (RoutingTrace& trace : made.traces) {
    if (hidden) continue;
    for (RoutingSpan* span : {&trace.encoder, &trace.decoder}) {
      span->hidden.clear();
      span->hidden_width = 0;
    }
  }
  return made;
}

enum class Input { kToken, kRouter, kTopK };
using KindAndInput = std::pair<const char*, Input>;

SpeculationConfig Config(const std::string& kind) {
  const MoeGeometry g{3, 3, kExperts, 1, kWidth};
  SpeculationConfig c = DefaultSpeculationConfig(kind, g, kVocabulary, kWidth);
  c.width = 16;
  c.heads = 2;
  c.ff = 24;
  c.priors = c.next_token = false;
  return c;
}
SpeculationConfig With(const std::string& kind, Input input) {
  SpeculationConfig c = Config(kind);
  c.token_inputs = input == Input::kToken;
  c.router_inputs = input == Input::kRouter;
  c.topk_inputs = input == Input::kTopK;
  if (c.router_inputs) c.hidden_width = kWidth;
  return c;
}

RoutingWindow Window(const SyntheticTraces& traces, Stack stack, int source) {
  const std::vector<const RoutingTrace*> both = {&traces.traces[0], &traces.traces[2]};
  RoutingWindow window = WindowsOf(both, stack, source, kExperts);
  AddGates(both, &window);
  return window;
}

class FurtherInputs : public testing::TestWithParam<KindAndInput> {
 protected:
  std::string kind() const { return GetParam().first; }
  Input input() const { return GetParam().second; }
  // The input, from token `first` on, is another.
  RoutingWindow Changed(const RoutingWindow& window, int64_t first) const {
    RoutingWindow w = window;
    const auto change = [&](at::Tensor* x, const auto& how) {
      if (!x->defined()) return;
      *x = x->clone();
      how(x->slice(1, first));
    };
    if (input() == Input::kToken) {
      change(&w.token_ids_BT, [](at::Tensor x) { x.add_(1).remainder_(kVocabulary); });
    } else if (input() == Input::kRouter) {
      for (at::Tensor* x : {&w.hidden_BTD, &w.context_BTD}) {
        change(x, [](at::Tensor part) { part.neg_(); });
      }
    } else {
      change(&w.gates_BTE, [](at::Tensor x) { x.copy_(x.flip({2})); });
    }
    return w;
  }
};

std::vector<KindAndInput> Cases() {
  std::vector<KindAndInput> cases;
  for (const char* kind : {"interlayer", "moe", "autoregressive", "multiscale"}) {
    for (const Input input : {Input::kToken, Input::kRouter, Input::kTopK}) {
      cases.emplace_back(kind, input);
    }
  }
  for (const char* kind :
       {"hidden", "stale_correction", "contextual", "transformer", "hierarchical",
        "simple", "lstm", "attention", "conv1d", "legacy_multiscale"}) {
    cases.emplace_back(kind, Input::kTopK);
  }
  return cases;
}
std::string NameOf(const KindAndInput& one) {
  const char* names[] = {"_token", "_router", "_topk"};
  return one.first + std::string(names[static_cast<int>(one.second)]);
}
INSTANTIATE_TEST_SUITE_P(Kinds, FurtherInputs, testing::ValuesIn(Cases()),
                         [](const auto& info) { return NameOf(info.param); });

TEST_P(FurtherInputs, AreReadAtTheOwnTokenAndBeforeIt) {
  const c10::NoGradGuard no_grad;
  const SyntheticTraces traces = Traces();
  const auto model = MakeSpeculationModel(With(kind(), input()), 7);
  for (const auto& [name, tensor] : model->constants().items()) {
    tensor.copy_(at::arange(tensor.numel()).remainder(7).view(tensor.sizes()) * .1);
  }
  for (const auto& [name, tensor] : model->parameters().items()) {
    tensor.add_(0.02 * at::arange(tensor.numel()).remainder(5).view(tensor.sizes()));
  }
  for (const Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
    for (int source = input() == Input::kTopK ? 0 : -1; source < 2; ++source) {
      // Before its first layer an encoder has no router input.
      const bool none = input() == Input::kRouter && !SeesRouterInputs(stack, source);
      const RoutingWindow window = Window(traces, stack, source);
      const auto expected = model->Forward(window, 0).logits_BTHE;
      for (const int64_t t : {int64_t{1}, int64_t{3}}) {
        const auto got = model->Forward(Changed(window, t), 0).logits_BTHE;
        const auto own = [&](const at::Tensor& x) { return x.select(1, t); };
        EXPECT_NE(at::allclose(own(got), own(expected), 1e-6, 1e-7), !none)
            << StackName(stack) << source << " token " << t;
        if (stack == Stack::kEncoder) continue;
        EXPECT_TRUE(
            at::allclose(got.slice(1, 0, t), expected.slice(1, 0, t), 1e-5, 1e-6));
      }
    }
  }
}

TEST_P(FurtherInputs, GradientsReachWhatTheyAdd) {
  const SyntheticTraces traces = Traces();
  const auto model = MakeSpeculationModel(With(kind(), input()), 7);
  at::Tensor loss = at::zeros({});
  for (const Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
    for (int source = -1; source < (stack == Stack::kEncoder ? 2 : 3); ++source) {
      const auto out = model->Forward(Window(traces, stack, source), 5);
      loss = loss + out.logits_BTHE.square().sum() + out.confidence_BTH.sum();
    }
  }
  loss.backward();
  for (const auto& [name, tensor] : model->parameters().items()) {
    if (!name.starts_with("inputs.")) continue;
    EXPECT_TRUE(tensor.grad().defined()) << name;
  }
}

TEST_P(FurtherInputs, OfMembersTogetherAreThoseOfEachAlone) {
  const c10::NoGradGuard no_grad;
  const RoutingWindow window = Window(Traces(), Stack::kDecoder, 1);
  const SpeculationConfig c = With(kind(), input());
  const auto both = KindOf(kind()).make(c, {5, 6})->Forward(window, 0);
  for (int64_t m = 0; m < 2; ++m) {
    const auto alone = MakeSpeculationModel(c, uint64_t(5 + m));
    EXPECT_TRUE(at::allclose(both.logits_BTHE.narrow(0, 2 * m, 2),
                             alone->Forward(window, 0).logits_BTHE, 1e-4, 1e-5));
  }
}

// Token by token, as the runtime asks.
TEST_P(FurtherInputs, AreServedAsTheyAreTrained) {
  if (kind() == "hidden") return;  // keeps no tokens
  const c10::NoGradGuard no_grad;
  const auto model = MakeSpeculationModel(With(kind(), input()), 7);
  const auto plain = MakeSpeculationModel(With(kind(), input()), 7);
  model->PrepareServing();
  const RoutingWindow whole = Window(Traces(), Stack::kDecoder, 1);
  for (int64_t t = 1; t <= whole.token_ids_BT.size(1); ++t) {
    RoutingWindow known = whole;
    for (at::Tensor* x : {&known.token_ids_BT, &known.valid_BT, &known.experts_BTL,
                          &known.hidden_BTD, &known.context_BTD, &known.gates_BTE}) {
      *x = x->narrow(1, 0, t).contiguous();
    }
    const auto expected = plain->Forward(known, 0).logits_BTHE.narrow(1, t - 1, 1);
    const auto got = model->ForwardLast(known).logits_BTHE;
    EXPECT_TRUE(at::allclose(got, expected, 1e-5, 1e-5)) << t;
  }
}

TEST_P(FurtherInputs, AreKeptInTheConfiguration) {
  const SpeculationConfig with = With(kind(), input());
  EXPECT_EQ(SpeculationConfig::FromJson(with.ToJson(), "x"), with);
  const Json usual = Config(kind()).ToJson();  // as files before them
  for (const char* key : {"token_inputs", "router_inputs", "topk_inputs"}) {
    EXPECT_FALSE(usual.contains(key));
  }
}

// Not recorded is an error, not an input of zeros.
TEST_P(FurtherInputs, AreNeverSilentlyMissing) {
  if (input() == Input::kToken) return;  // every window has ids
  RoutingWindow window = Window(Traces(), Stack::kDecoder, 1);
  window.gates_BTE = window.hidden_BTD = at::Tensor();
  const auto model = MakeSpeculationModel(With(kind(), input()), 7);
  if (input() == Input::kTopK && Config(kind()).hidden_width > 0) {
    window.hidden_BTD = Window(Traces(), Stack::kDecoder, 1).hidden_BTD;
  }
  EXPECT_THROW(model->Forward(window, 0), std::logic_error);
}

TEST(FurtherInputsTest, AKindThatHasThemAnywayTakesNone) {
  for (const auto& [kind, input] :
       {KindAndInput{"hidden", Input::kToken}, KindAndInput{"lstm", Input::kRouter},
        KindAndInput{"contextual", Input::kToken}}) {
    EXPECT_THROW(SpeculationConfig::FromJson(With(kind, input).ToJson(), "x"), DataError);
  }
  SpeculationConfig c = With("interlayer", Input::kRouter);
  c.hidden_width = 0;
  EXPECT_THROW(SpeculationConfig::FromJson(c.ToJson(), "x"), DataError);
  c = With("interlayer", Input::kToken);
  c.vocab_size = 0;
  EXPECT_THROW(SpeculationConfig::FromJson(c.ToJson(), "x"), DataError);
}

// What each adds to `interlayer`: an embedding and a map of it; a norm and a map by
// source layer, two of the encoder's and the decoder's three, and of the token before; a
// map.
TEST(FurtherInputsTest, AddMapsAndNothingElse) {
  const auto parameters = [](const SpeculationConfig& c) {
    return MakeSpeculationModel(c, 1)->parameters().num_elements();
  };
  const int64_t usual = parameters(Config("interlayer"));
  EXPECT_EQ(parameters(With("interlayer", Input::kToken)) - usual,
            kVocabulary * 64 + 65 * 16);
  EXPECT_EQ(parameters(With("interlayer", Input::kRouter)) - usual,
            6 * (2 * kWidth + (kWidth + 1) * 16));
  EXPECT_EQ(parameters(With("interlayer", Input::kTopK)) - usual, (kExperts + 1) * 16);
  EXPECT_EQ(parameters(With("lstm", Input::kTopK)), parameters(Config("lstm")));
}

// An id beyond those of the training store reads as padding does.
TEST(FurtherInputsTest, UnknownIdsAreNoError) {
  const c10::NoGradGuard no_grad;
  const auto model = MakeSpeculationModel(With("interlayer", Input::kToken), 7);
  RoutingWindow window = Window(Traces(), Stack::kDecoder, 1), padded = window;
  window.token_ids_BT = at::full_like(window.token_ids_BT, kVocabulary + 5);
  padded.token_ids_BT = at::zeros_like(window.token_ids_BT);
  EXPECT_TRUE(at::equal(model->Forward(window, 0).logits_BTHE,
                        model->Forward(padded, 0).logits_BTHE));
}

TEST(FurtherInputsTest, GatesAreTheRecordedProbabilitiesAtTheSource) {
  const SyntheticTraces traces = Traces();
  const RoutingWindow window = Window(traces, Stack::kDecoder, 1);
  const RoutingSpan& span = traces.traces[2].decoder;
  for (int t = 0; t < span.num_tokens; ++t) {
    const auto row = window.gates_BTE[1][t];
    float sum = 0;
    for (int k = 0; k < kTopK; ++k) {
      const auto at = static_cast<size_t>((span.num_tokens + t) * kTopK + k);
      EXPECT_EQ(row[span.topk_ids[at]].item<float>(), span.topk_probs[at]);
      sum += span.topk_probs[at];
    }
    EXPECT_NEAR(row.sum().item<float>(), sum, 1e-6);
  }
  EXPECT_FALSE(Window(traces, Stack::kDecoder, -1).gates_BTE.defined());
  EXPECT_FALSE(Window(Traces(0), Stack::kDecoder, 1).gates_BTE.defined());
}

// Parts, masks and relabelled experts.
TEST(FurtherInputsTest, GatesMoveWithWhatAugmentationMoves) {
  const RoutingWindow before = Window(Traces(), Stack::kEncoder, 1);
  const int64_t T = before.token_ids_BT.size(1);
  SpeculationBatch batch;
  batch.window = before;
  batch.window.training.hidden_ids_BTL = at::Tensor();
  batch.labels_BTH = at::ones({2, T, 1}, at::kLong);
  batch.documents_BT = at::ones({2, T}, at::kLong);
  AugmentOptions options;
  options.subsequence = 1;
  options.mask = 0.3;
  options.permutation = 1;
  int told = 0, hidden = 0;
  for (uint64_t key = 1; key < 6; ++key) {
    SpeculationBatch part = batch;
    for (at::Tensor* x : {&part.labels_BTH, &part.documents_BT, &part.window.token_ids_BT,
                          &part.window.valid_BT, &part.window.experts_BTL,
                          &part.window.hidden_BTD, &part.window.gates_BTE}) {
      *x = x->clone();
    }
    Augment(options, key, &part);
    const auto likeliest = part.window.gates_BTE.argmax(2);
    for (int64_t t = 0; t < T; ++t) {
      const auto chosen = part.window.experts_BTL[0][t][1].item<int64_t>();
      if (chosen == kExperts) {
        EXPECT_EQ(part.window.gates_BTE[0][t].sum().item<float>(), 0);
        ++hidden;
      } else {
        EXPECT_EQ(likeliest[0][t].item<int64_t>(), chosen);
        ++told;
      }
    }
  }
  EXPECT_GT(std::min(told, hidden), 5);
}

// Where an id is hidden and asked for, nothing else tells it.
TEST(FurtherInputsTest, MaskedIdsAreNotToldOtherwise) {
  SpeculationBatch batch;
  batch.window = Window(Traces(), Stack::kDecoder, 1);
  batch.labels_BTH = at::ones({2, batch.window.token_ids_BT.size(1), 3}, at::kLong);
  AugmentOptions options;
  options.masked_ids = 0.4;
  Augment(options, 3, &batch);
  const RoutingWindow& w = batch.window;
  const auto asked = w.training.hidden_ids_BTL;
  int64_t count = 0;
  for (int64_t t = 0; t + 1 < asked.size(1); ++t) {
    const bool source = asked[0][t][1].item<int64_t>() >= 0;
    const bool last = asked[0][t][2].item<int64_t>() >= 0;
    if (!w.valid_BT[0][t + 1].item<bool>()) continue;
    EXPECT_EQ(w.gates_BTE[0][t].sum().item<float>() == 0, source) << t;
    EXPECT_EQ(w.hidden_BTD[0][t].abs().sum().item<float>() == 0, source) << t;
    EXPECT_EQ(w.context_BTD[0][t + 1].abs().sum().item<float>() == 0, last) << t;
    count += source;
  }
  EXPECT_GT(count, 1);
}

class FurtherTraining : public testing::Test {
 protected:
  SpeculationJob Job(const std::string& name, const std::string& kind = "interlayer") {
    SpeculationJob job;
    SpeculationOptions& o = job.options;
    o.kind = kind;
    if (kind != "ensemble") o.sizes = {16, 2, 24, 1, 0, 0.1};
    o.token_inputs = o.router_inputs = o.topk_inputs = true;
    o.steps = 8;
    o.validate_every = 5;
    o.global_batch = 16;
    o.micro_batch = 8;
    o.validation_sequences = o.test_sequences = 8;
    job.out = folder_.path() / name;
    job.quiet = true;
    return job;
  }
  TempFolder folder_;
};

TEST_F(FurtherTraining, StopsAndGoesOnWithEqualBits) {
  const SyntheticTraces traces = Traces();
  const auto expected = Train(Job("whole"), traces);
  SpeculationJob parts = Job("parts");
  parts.stop_after = 6;
  EXPECT_THROW(Train(parts, traces), StoppedError);
  parts.stop_after = 0;
  EXPECT_EQ(Train(parts, traces).results.dump(), expected.results.dump());
  EXPECT_EQ(ReadFile(parts.out / "model.safetensors"),
            ReadFile(folder_.path() / "whole" / "model.safetensors"));
}

TEST_F(FurtherTraining, MembersOfAnEnsembleHaveWhatTheyTake) {
  SpeculationJob job = Job("ensemble", "ensemble");
  job.options.members = "interlayer:width=16,heads=2,layers=1;lstm:width=16,layers=1";
  Train(job, Traces());
  const auto config = LoadSpeculationModel(job.out).model->config();
  EXPECT_TRUE(config.members[0].token_inputs && config.members[0].router_inputs);
  EXPECT_FALSE(config.members[1].token_inputs || config.members[1].router_inputs);
  EXPECT_TRUE(config.members[0].topk_inputs && config.members[1].topk_inputs);
  EXPECT_THROW(LoadPredictor(job.out.string(), config.geometry, "", {}), UsageError);
}

TEST_F(FurtherTraining, IdsAndRouterInputsAreServedAndTopKIsNot) {
  SpeculationJob job = Job("run");
  Train(job, Traces());
  const MoeGeometry g = Traces().geometry;
  EXPECT_THROW(LoadPredictor(job.out.string(), g, "", {}), UsageError);
  SpeculationJob served = Job("served");
  served.options.topk_inputs = false;
  Train(served, Traces());
  EXPECT_TRUE(LoadPredictor(served.out.string(), g, "", {})->needs_hidden());
}

TEST_F(FurtherTraining, WhatTheStoreLacksIsNamedBeforeTheFirstStep) {
  SpeculationJob job = Job("refused");
  job.options.token_inputs = job.options.router_inputs = false;
  EXPECT_THAT(Refusal(job, Traces(0)), testing::HasSubstr("--topk_inputs"));
  job.options.topk_inputs = false;
  job.options.router_inputs = true;
  EXPECT_THAT(Refusal(job, Traces(kTopK, false)), testing::HasSubstr("--router_inputs"));
  job.options.router_inputs = false;
  job.options.token_inputs = true;
  SyntheticTraces bare = Traces(0, false);
  for (RoutingTrace& trace : bare.traces) {
    trace.encoder.token_ids.clear();
    trace.decoder.token_ids.clear();
  }
  EXPECT_THAT(Refusal(job, bare), testing::HasSubstr("--token_inputs"));
  job.onnx = true;
  EXPECT_THAT(Refusal(job, Traces()), testing::HasSubstr("--token_inputs"));
}

TEST_F(FurtherTraining, ARunToStartFromHasTheSameInputs) {
  SpeculationJob first = Job("first");
  Train(first, Traces());
  SpeculationJob next = Job("next");
  next.options.sizes = {};
  next.options.start_from = first.out.string();
  EXPECT_EQ(Train(next, Traces()).losses.size(), 8u);
  next.out = folder_.path() / "refused";
  next.options.router_inputs = false;
  EXPECT_THAT(Refusal(next, Traces()), testing::HasSubstr("--router_inputs"));
}

}  // namespace
}  // namespace routecast
