// Models of several experts a token: labels, features, counts and scores against plain
// loops; and predictors that adapt while they serve.
#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "common/errors.h"
#include "models/baseline_predictors.h"
#include "models/online_predictor.h"
#include "models/speculation_metrics.h"
#include "speculation_test_support.h"

namespace routecast {
namespace {

constexpr int kChosen = 3;

MoeGeometry SetGeometry() {
  MoeGeometry g = SmallGeometry();
  g.experts_per_token = kChosen;
  return g;
}

// Three experts a token; token ids where asked for.
RoutingTrace SetTrace(uint64_t seed, int tokens, bool ids) {
  const MoeGeometry g = SetGeometry();
  RoutingTrace trace = RandomTrace(g, tokens, tokens, seed);
  for (RoutingSpan* span : {&trace.encoder, &trace.decoder}) {
    if (!ids) span->token_ids.clear();
    span->top_k = kChosen;
    for (size_t i = 0; i < span->expert_ids.size(); ++i) {
      const int first = span->expert_ids[i];
      const int step = 1 + static_cast<int>(ToRange(Mix(seed, 9, i), 2));
      for (int k = 0; k < kChosen; ++k) {
        span->topk_ids.push_back(
            static_cast<uint16_t>((first + k * step) % g.num_experts));
      }
    }
  }
  return trace;
}

int64_t ChosenAt(const RoutingSpan& span, int t, int l, int k) {
  return span.topk_ids[static_cast<size_t>((l * span.num_tokens + t) * kChosen + k)];
}

// Of the first sequence at one lead, [T,K].
at::Tensor LabelSets(const WindowTargets& targets, int lead) {
  return at::cat({targets.labels_BTH[0].narrow(1, lead - 1, 1),
                  targets.others_BTHK[0].select(1, lead - 1)},
                 1);
}

TEST(RoutingSetsTest, LabelsHoldEveryExpertOfTheTarget) {
  const RoutingTrace trace = SetTrace(1, 6, false);
  const auto targets = WindowTargetsOf({&trace}, Stack::kDecoder, 1, 3, kChosen);
  const auto labels = LabelSets(targets, 3);
  const auto first = WindowLabels(trace, Stack::kDecoder, 1, 3);
  for (int t = 0; t < 6; ++t) {  // lead 3 of 3 layers: layer 1 of the next token
    EXPECT_EQ(labels[t][0].item<int64_t>(), first[t].item<int64_t>());
    for (int k = 0; k < kChosen && first[t].item<int64_t>() >= 0; ++k) {
      EXPECT_EQ(labels[t][k].item<int64_t>(), ChosenAt(trace.decoder, t + 1, 1, k));
    }
  }
}

TEST(RoutingSetsTest, ATraceWithoutAllExpertsIsDamage) {
  RoutingTrace trace = SetTrace(1, 6, false);
  trace.decoder.topk_ids.clear();
  EXPECT_THROW(WindowTargetsOf({&trace}, Stack::kDecoder, 1, 1, kChosen), DataError);
}

TEST(RoutingSetsTest, TheEncoderHidesOtherChoicesPastTheSource) {
  const RoutingTrace trace = SetTrace(2, 5, false);
  const auto window = WindowOf(trace, Stack::kEncoder, 1, 5, kChosen);
  ASSERT_EQ(window.others_BTLK.sizes(), (at::IntArrayRef{1, 5, 4, kChosen - 1}));
  EXPECT_TRUE(window.others_BTLK.narrow(2, 2, 2).eq(5).all().item<bool>());
  EXPECT_EQ(window.others_BTLK[0][3][1][1].item<int64_t>(),
            ChosenAt(trace.encoder, 3, 1, 2));
}

TEST(RoutingSetsTest, InterlayerSeesTheOtherChoices) {
  const c10::NoGradGuard no_grad;
  SpeculationConfig config = SmallSpeculation("interlayer");
  config.geometry = SetGeometry();
  const auto model = MakeSpeculationModel(config, 3);
  RoutingWindow window = WindowOf(SetTrace(3, 5, false), Stack::kDecoder, 1, 5, kChosen);
  const auto before = model->Forward(window, 0).logits_BTHE;
  window.others_BTLK = window.others_BTLK.clone();
  window.others_BTLK[0][2][1][1] = (window.others_BTLK[0][2][1][1] + 1).remainder(5);
  const auto after = model->Forward(window, 0).logits_BTHE;
  EXPECT_TRUE(at::allclose(before.narrow(1, 0, 2), after.narrow(1, 0, 2)));  // causal
  EXPECT_FALSE(at::allclose(before.select(1, 2), after.select(1, 2)));
}

// Order 1, from each expert of the source to each of the target, averaged.
TEST(RoutingSetsTest, MarkovCountsFromSetsToSets) {
  const MoeGeometry g = SetGeometry();
  const auto tables = std::make_shared<BaselineTables>(g, 0);
  std::vector<RoutingTrace> traces;
  for (uint64_t s = 0; s < 10; ++s) {
    traces.push_back(SetTrace(20 + s, 6, false));
    tables->Fit(traces.back());
  }
  double count[5][5] = {}, all[5] = {}, total = 0;  // encoder layers 0 -> 2, and layer 2
  for (const RoutingTrace& trace : traces) {
    for (int t = 0; t < 6; ++t) {
      if (trace.encoder.dropped[2 * 6 + t]) continue;  // no label
      for (int j = 0; j < kChosen; ++j) {
        const auto to = ChosenAt(trace.encoder, t, 2, j);
        ++all[to];
        ++total;
        for (int i = 0; i < kChosen; ++i) {
          ++count[ChosenAt(trace.encoder, t, 0, i)][to];
        }
      }
    }
  }
  const RoutingTrace test = SetTrace(99, 6, false);
  const auto markov = MakeBaseline("pattern", tables, g, {});
  const auto probs = *markov->Predict(WindowOf(test, Stack::kEncoder, 0, 5, kChosen), 2);
  for (int e = 0; e < 5; ++e) {
    double expected = 0;
    for (int i = 0; i < kChosen; ++i) {
      const auto from = ChosenAt(test.encoder, 4, 0, i);
      double n = 0;
      for (const double c : count[from]) n += c;
      const double frequency = (all[e] + .1) / (total + .5);
      expected += (count[from][e] + 2 * frequency) / (n + 2) / kChosen;
    }
    EXPECT_NEAR(probs[0][4][e].item<double>(), expected, 1e-5);
  }
}

TEST(RoutingSetsTest, RecallIsCountedByChoice) {
  at::manual_seed(3);
  const auto probs = at::softmax(at::randn({40, 6}), -1);
  auto labels = at::empty({40, kChosen}, at::kLong);
  for (int n = 0; n < 40; ++n) {
    for (int k = 0; k < kChosen; ++k) labels[n][k] = (n * 5 + k * 2 + n / 7) % 6;
  }
  labels[7].fill_(-100);
  LeadAccumulator accumulator(Stack::kDecoder, 0, 1, 1);
  accumulator.Add(probs, labels, at::arange(40).floor_divide(4));
  double by_choice[kChosen] = {}, twice = 0;
  for (int n = 0; n < 40; ++n) {
    if (n == 7) continue;
    for (int k = 0; k < kChosen; ++k) {
      const double own = probs[n][labels[n][k].item<int64_t>()].item<double>();
      const int rank = probs[n].gt(own).sum().item<int>();
      by_choice[k] += rank < kChosen ? 1 / 39. : 0;
      twice += rank < 2 * kChosen ? 1 / 39. / kChosen : 0;
    }
  }
  const LeadScores scores = accumulator.Scores();
  ASSERT_EQ(scores.by_choice.size(), 3u);
  double recall = 0;
  for (int k = 0; k < kChosen; ++k) {
    EXPECT_NEAR(scores.by_choice[size_t(k)], by_choice[k], 1e-9);
    recall += by_choice[k] / kChosen;
  }
  EXPECT_NEAR(scores.recall, recall, 1e-9);
  EXPECT_NEAR(scores.recall_twice, twice, 1e-9);
  EXPECT_LE(scores.ci95_low, scores.recall);
  EXPECT_GE(scores.ci95_high, scores.recall);
  LeadAccumulator merged(Stack::kDecoder, 0, 1, 1);
  merged.Merge(accumulator.Bytes());
  EXPECT_EQ(merged.Scores().ToJson(), scores.ToJson());
}

// The first document's questions all failed: its rows are of as many choices.
TEST(RoutingSetsTest, RowsWithoutAnAnswerAreOfAsManyChoices) {
  LeadAccumulator accumulator(Stack::kDecoder, 0, 1, 1);
  accumulator.AddUnanswered(1, 2, kChosen);
  accumulator.Add(at::tensor({.4f, .3f, .2f, .1f}).view({1, 4}),
                  at::tensor({0, 1, 2}, at::kLong).view({1, 3}),
                  at::full({1}, 2, at::kLong));
  const LeadScores scores = accumulator.Scores();
  ASSERT_EQ(scores.by_choice.size(), 3u);
  EXPECT_DOUBLE_EQ(scores.recall, 1. / 3);
  EXPECT_EQ(scores.by_document.at(0).of, 6);
}

// Each of the newest layer's choices has an equal part of what is carried.
TEST(RoutingSetsTest, ControlsCarryEveryChoice) {
  const MoeGeometry g = SetGeometry();
  const auto tables = std::make_shared<BaselineTables>(g, 0);
  const RoutingTrace trace = SetTrace(4, 5, false);
  const auto carried = MakeBaseline("layer_minus_1", tables, g, {});
  const auto probs =
      *carried->Predict(WindowOf(trace, Stack::kEncoder, 1, 5, kChosen), 1);
  std::vector<float> expected(5, .1f / 5);
  for (int k = 0; k < kChosen; ++k)
    expected[static_cast<size_t>(ChosenAt(trace.encoder, 2, 1, k))] += .9f / kChosen;
  for (int e = 0; e < 5; ++e)
    EXPECT_NEAR(probs[0][2][e].item<float>(), expected[static_cast<size_t>(e)], 1e-6);
}

TEST(OnlineBiasTest, FollowsWhatHappensAndStartsWithoutEffect) {
  OnlineBias bias(0.05);
  const auto probs = at::ones({50, 4}) / 4;
  EXPECT_TRUE(at::equal(bias.Apply(Stack::kDecoder, 0, 1, probs), probs));
  auto labels = at::full({50, 1}, 2, at::kLong);
  labels.narrow(0, 0, 10).fill_(-100);  // do not count
  for (int i = 0; i < 20; ++i) {
    bias.Learn(Stack::kDecoder, 0, 1, bias.Apply(Stack::kDecoder, 0, 1, probs), labels);
  }
  EXPECT_GT(bias.Apply(Stack::kDecoder, 0, 1, probs)[0][2].item<double>(), 0.9);
  EXPECT_TRUE(at::equal(bias.Apply(Stack::kDecoder, 1, 1, probs), probs));  // its own
}

// Says the same always; the windows then show expert 3 at every layer.
class Stubborn final : public ExpertPredictor {
 public:
  std::string name() const override { return "stubborn"; }
  bool needs_hidden() const override { return false; }
  int history_tokens() const override { return 1; }
  std::optional<at::Tensor> Predict(const RoutingWindow& window, int) override {
    return at::ones({window.token_ids_BT.size(0), window.token_ids_BT.size(1), 5}) / 5;
  }
};

RoutingWindow Served(int source, int64_t rows, int64_t tokens = 1, int layers = 2,
                     int64_t first_token = 0) {
  RoutingWindow window;
  window.stack = Stack::kDecoder;
  window.source_layer = source;
  window.num_layers = layers;
  window.num_experts = 5;
  window.first_token = first_token;
  window.token_ids_BT = at::zeros({rows, tokens}, at::kLong);
  window.valid_BT = at::ones({rows, tokens}, at::kBool);
  window.experts_BTL = at::full({rows, tokens, layers}, 3, at::kLong);
  return window;
}

// With the next token guessed nobody is asked after the last layer: its truth is in the
// window of the question before the next token's first.
TEST(OnlinePredictorTest, LearnsTheLastLayerFromTheNextTokensFirstQuestion) {
  for (const int layers : {1, 2}) {
    OnlinePredictor predictor(std::make_unique<Stubborn>(), 0.1);
    double last = 0;
    for (int token = 0; token < 60; ++token) {
      for (int source = -1; source < layers - 1; ++source) {
        const auto probs =
            predictor.PredictLast(Served(source, 2, 2, layers, token), layers);
        if (source == -1) last = (*probs[layers - 1])[0][0][3].item<double>();
      }
      EXPECT_LE(predictor.open_answers(), static_cast<size_t>(3 * layers)) << token;
    }
    EXPECT_GT(last, 0.8) << layers;
  }
}

// A question that is asked again, of another guess of the token, takes the first one's
// place.
TEST(OnlinePredictorTest, LearnsFromTheLastAnswerToAQuestionAlone) {
  const auto learnt = [](bool again) {
    OnlinePredictor predictor(std::make_unique<Stubborn>(), 0.1);
    predictor.PredictLast(Served(0, 2, 2), 2);
    predictor.PredictLast(Served(-1, 2, 2, 2, 1), 2);
    if (again) predictor.PredictLast(Served(-1, 2, 2, 2, 1), 2);
    predictor.PredictLast(Served(0, 2, 2, 2, 1), 2);
    predictor.PredictLast(Served(-1, 2, 2, 2, 2), 2);
    return *predictor.Predict(Served(-1, 2, 2), 1);
  };
  EXPECT_TRUE(at::equal(learnt(false), learnt(true)));
}

TEST(OnlinePredictorTest, LearnsFromTheRoutingThatCame) {
  OnlinePredictor predictor(std::make_unique<Stubborn>(), 0.1);
  double first = 0, last = 0;
  for (int token = 0; token < 60; ++token) {
    for (const int source : {-1, 0, 1}) {
      const auto probs = predictor.PredictLast(Served(source, 2), 2);
      if (source != 0) continue;
      last = (*probs[0])[0][0][3].item<double>();
      if (token == 0) first = last;
    }
  }
  EXPECT_NEAR(first, 0.2, 1e-6);
  EXPECT_GT(last, 0.8);
}

TEST(OnlinePredictorTest, LearnsEveryChoice) {
  OnlinePredictor predictor(std::make_unique<Stubborn>(), 0.1);
  at::Tensor last;
  for (int token = 0; token < 60; ++token) {
    for (const int source : {-1, 0, 1}) {
      RoutingWindow window = Served(source, 2);
      window.others_BTLK = at::full({2, 1, 2, 1}, 1, at::kLong);
      const auto probs = predictor.PredictLast(window, 2);
      if (source == 0) last = (*probs[0])[0][0];
    }
  }
  EXPECT_GT(last[3].item<double>(), 0.4);
  EXPECT_NEAR(last[1].item<double>(), last[3].item<double>(), 1e-6);
}

TEST(OnlinePredictorTest, AnswersForOtherRowsAreForgotten) {
  OnlinePredictor predictor(std::make_unique<Stubborn>(), 0.5);
  predictor.PredictLast(Served(-1, 2), 1);
  predictor.PredictLast(Served(0, 3), 1);  // a row more: not the same
  EXPECT_NEAR((*predictor.Predict(Served(-1, 3), 1))[0][0][3].item<double>(), 0.2, 1e-6);
}

}  // namespace
}  // namespace routecast
