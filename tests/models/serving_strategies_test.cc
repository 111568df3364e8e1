// Strategies that count while they serve: what each learns from routing that has a rule,
// and what they must not do.
#include "models/serving_strategies.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <functional>

#include "common/errors.h"
#include "models/predictor_factory.h"

namespace routecast {
namespace {

constexpr int kLayers = 3, kExperts = 40;

// A decoder that is served: tokens by `id`, experts by `expert` (token, layer).
struct Served {
  std::function<int64_t(int)> id;
  std::function<int(int, int)> expert;
  int batch = 1;
  std::function<int(int, int)> other = nullptr;  // the second choice, where there is one

  RoutingWindow Window(int token, int source) const {
    const int first = std::max(0, token - 3), tokens = token - first + 1;
    RoutingWindow window;
    window.stack = Stack::kDecoder;
    window.source_layer = source;
    window.num_layers = kLayers;
    window.num_experts = kExperts;
    window.first_token = first;
    window.token_ids_BT = at::zeros({batch, tokens}, at::kLong);
    window.valid_BT = at::ones({batch, tokens}, at::kBool);
    window.experts_BTL = at::full({batch, tokens, kLayers}, kExperts, at::kLong);
    if (other)
      window.others_BTLK = at::full({batch, tokens, kLayers, 1}, kExperts, at::kLong);
    for (int t = 0; t < tokens; ++t) {
      for (int b = 0; b < batch; ++b) {
        window.token_ids_BT[b][t] = id(first + t);
        for (int l = 0; l < kLayers; ++l) {
          if (t + 1 == tokens && l > source) continue;
          window.experts_BTL[b][t][l] = expert(first + t, l);
          if (other) window.others_BTLK[b][t][l][0] = other(first + t, l);
        }
      }
    }
    return window;
  }
  // All questions of tokens [from, to).
  void Ask(ExpertPredictor* predictor, int from, int to) const {
    for (int t = from; t < to; ++t) {
      for (int source = -1; source < kLayers; ++source)
        predictor->PredictLast(Window(t, source), kLayers);
    }
  }
};

int Best(const std::optional<at::Tensor>& probs) {
  return probs ? static_cast<int>(probs->select(1, 0)[0].argmax().item<int64_t>()) : -1;
}
int64_t Named(const at::Tensor& probs) { return probs.gt(0).sum().item<int64_t>(); }

// Seven ids in turn; what a layer chooses follows from the last three.
Served Periodic() {
  return {[](int t) { return t % 7; }, [](int t, int l) { return (t % 7) * 3 + l; }};
}

TEST(ServingStrategiesTest, PatternsOfThreeTokensNameTheExperts) {
  const auto predictor =
      MakeServingStrategy("token_patterns", {0, kLayers, kExperts, 1, 8});
  const Served served = Periodic();
  served.Ask(predictor.get(), 0, 60);
  const auto answers = predictor->PredictLast(served.Window(60, -1), kLayers);
  for (int l = 0; l < kLayers; ++l)
    EXPECT_EQ(Best(answers[static_cast<size_t>(l)]), served.expert(60, l));
}

TEST(ServingStrategiesTest, PatternsNameTheNextTokensExpertsByTheChainOfChoices) {
  const auto predictor =
      MakeServingStrategy("token_patterns", {0, kLayers, kExperts, 1, 8});
  const Served served = Periodic();
  served.Ask(predictor.get(), 0, 60);
  const auto answers = predictor->PredictLast(served.Window(59, kLayers - 1), kLayers);
  for (int l = 0; l < kLayers; ++l)
    EXPECT_EQ(Best(answers[static_cast<size_t>(l)]), served.expert(60, l));
}

// With one layer and the next token guessed, every question is before that layer.
TEST(ServingStrategiesTest, OneLayerIsLearntFromQuestionsBeforeItAlone) {
  const auto predictor = MakeServingStrategy("token_patterns", {0, 1, kExperts, 1, 8});
  const auto window = [](int token) {
    RoutingWindow w = Periodic().Window(token, -1);
    w.num_layers = 1;
    w.experts_BTL = w.experts_BTL.narrow(2, 0, 1).contiguous();
    return w;
  };
  for (int t = 0; t < 60; ++t) predictor->PredictLast(window(t), 1);
  EXPECT_EQ(Best(predictor->PredictLast(window(60), 1)[0]), Periodic().expert(60, 0));
}

TEST(ServingStrategiesTest, PatternsAreSilentBelowThreeCounts) {
  const auto predictor =
      MakeServingStrategy("token_patterns", {0, kLayers, kExperts, 1, 8});
  const Served served = Periodic();
  served.Ask(predictor.get(), 0, 3);
  const auto answers = predictor->PredictLast(served.Window(3, -1), 1);
  ASSERT_TRUE(answers[0].has_value());
  EXPECT_EQ(Named(*answers[0]), 0);
}

TEST(ServingStrategiesTest, RecentFrequencyListsTheMostFrequentOfAllLayers) {
  const auto predictor =
      MakeServingStrategy("recent_frequency", {0, kLayers, kExperts, 1, 8});
  // Layer 0 always takes 5; the others spread over all experts.
  const Served served{[](int) { return 1; },
                      [](int t, int l) { return l == 0 ? 5 : (t * 7 + l) % kExperts; }};
  served.Ask(predictor.get(), 0, 205);
  const auto answers = predictor->PredictLast(served.Window(205, -1), kLayers);
  int64_t named = 0;
  for (const auto& probs : answers) named += Named(*probs);
  EXPECT_EQ(named, 32);
  EXPECT_EQ(Best(answers[0]), 5);
  EXPECT_FLOAT_EQ(answers[0]->sum().item<float>(), 1);
}

TEST(ServingStrategiesTest, RecentFrequencyRenewsItsListEveryHundredTokens) {
  const auto predictor =
      MakeServingStrategy("recent_frequency", {0, kLayers, kExperts, 1, 8});
  const Served served{[](int) { return 1; }, [](int t, int) { return t < 50 ? 5 : 6; }};
  served.Ask(predictor.get(), 0, 100);  // the list is that of the first token
  EXPECT_EQ(Best(predictor->PredictLast(served.Window(100, -1), 1)[0]), 5);
  served.Ask(predictor.get(), 100, 130);
  EXPECT_EQ(Best(predictor->PredictLast(served.Window(130, -1), 1)[0]), 6);
}

// Layer 0 takes 5 and 9, the others spread over all experts; the list holds 32 of each
// choice.
TEST(ServingStrategiesTest, OfTwoExpertsATokenBothAreCounted) {
  const auto predictor =
      MakeServingStrategy("recent_frequency", {0, kLayers, kExperts, 2, 8});
  const Served served{[](int) { return 1; },
                      [](int t, int l) { return l == 0 ? 5 : (t * 7 + l) % kExperts; }, 1,
                      [](int t, int l) { return l == 0 ? 9 : (t * 9 + 2) % kExperts; }};
  served.Ask(predictor.get(), 0, 205);
  const auto answers = predictor->PredictLast(served.Window(205, -1), kLayers);
  EXPECT_FLOAT_EQ((*answers[0])[0][0][5].item<float>(), 0.5f);
  EXPECT_FLOAT_EQ((*answers[0])[0][0][9].item<float>(), 0.5f);
  int64_t named = 0;
  for (const auto& probs : answers) named += Named(*probs);
  EXPECT_EQ(named, 64);
}

// A context that came twice has four counts of two choices: it still says nothing.
TEST(ServingStrategiesTest, ThreeTimesAreThreeTimesWhateverIsCountedATime) {
  const auto predictor =
      MakeServingStrategy("token_patterns", {0, kLayers, kExperts, 2, 8});
  const Served served{[](int) { return 1; }, [](int, int) { return 5; }, 1,
                      [](int, int) { return 9; }};
  served.Ask(predictor.get(), 0, 3);
  EXPECT_EQ(Named(*predictor->PredictLast(served.Window(3, -1), 1)[0]), 0);
  served.Ask(predictor.get(), 3, 4);
  const auto answer = predictor->PredictLast(served.Window(4, -1), 1)[0];
  EXPECT_EQ(Named(*answer), 2);
  EXPECT_FLOAT_EQ((*answer)[0][0][9].item<float>(), 0.5f);
}

TEST(ServingStrategiesTest, MixedScoresFollowTransitionsThatAreRight) {
  const auto predictor =
      MakeServingStrategy("mixed_scores", {0, kLayers, kExperts, 1, 8});
  // Ids and frequencies say nothing; a layer's expert follows from the one before.
  const Served served{[](int t) { return t; },
                      [](int t, int l) { return ((t * t) % 13 + 13 * l) % kExperts; }};
  served.Ask(predictor.get(), 0, 150);
  int right = 0;
  for (int t = 150; t < 170; ++t) {
    const auto answers = predictor->PredictLast(served.Window(t, 0), 1);
    right += Best(answers[0]) == served.expert(t, 1);
  }
  EXPECT_GE(right, 19);
}

TEST(ServingStrategiesTest, ATokenIsLearntOnceHoweverOftenItIsAskedAbout) {
  for (const std::string& name : ServingStrategyNames()) {
    const MoeGeometry g{0, kLayers, kExperts, 1, 8};
    const auto once = MakeServingStrategy(name, g), often = MakeServingStrategy(name, g);
    const Served served = Periodic();
    for (int t = 0; t < 30; ++t) {
      served.Ask(once.get(), t, t + 1);
      often->PredictLast(served.Window(t, -1), kLayers);  // as under another guess
      served.Ask(often.get(), t, t + 1);
    }
    const auto a = once->PredictLast(served.Window(30, -1), kLayers),
               b = often->PredictLast(served.Window(30, -1), kLayers);
    for (size_t i = 0; i < a.size(); ++i) {
      // A part that is judged twice moves its weight twice: no more than that differs.
      EXPECT_TRUE(at::allclose(*a[i], *b[i], 0, name == "mixed_scores" ? 0.05 : 0))
          << name;
    }
  }
}

TEST(ServingStrategiesTest, AnswersAreProbabilitiesOfThirtyTwoExpertsAtMost) {
  for (const std::string& name : ServingStrategyNames()) {
    const auto predictor = MakeServingStrategy(name, {0, kLayers, kExperts, 1, 8});
    const Served served{[](int t) { return t % 3; },
                        [](int t, int l) { return (t * 11 + l * 5) % kExperts; }, 2};
    for (int t = 0; t < 120; ++t) {
      served.Ask(predictor.get(), t, t + 1);
      for (const auto& probs : predictor->PredictLast(served.Window(t, 0), kLayers)) {
        if (!probs) continue;
        EXPECT_EQ(probs->sizes(), (std::vector<int64_t>{2, 1, kExperts})) << name;
        EXPECT_GE(probs->min().item<float>(), 0) << name;
        EXPECT_LE(probs->sum(-1).max().item<float>(), 1.0001) << name;
        EXPECT_LE(Named(probs->select(0, 1)), 32) << name;
      }
    }
  }
}

TEST(ServingStrategiesTest, EncodersAndWholeWindowsGetNoAnswer) {
  for (const std::string& name : ServingStrategyNames()) {
    const auto predictor = MakeServingStrategy(name, {kLayers, kLayers, kExperts, 1, 8});
    RoutingWindow window = Periodic().Window(5, 0);
    EXPECT_FALSE(predictor->Predict(window, 1).has_value()) << name;
    window.stack = Stack::kEncoder;
    for (const auto& answer : predictor->PredictLast(window, 2))
      EXPECT_FALSE(answer) << name;
  }
}

TEST(ServingStrategiesTest, TheFactoryKnowsTheirNames) {
  const MoeGeometry g{0, kLayers, kExperts, 1, 8};
  for (const std::string& name : ServingStrategyNames())
    EXPECT_EQ(LoadPredictor(name, g, "", {})->name(), name);
  try {
    LoadPredictor("mixed_score", g, "", {});
    FAIL();
  } catch (const UsageError& e) {
    EXPECT_NE(std::string(e.what()).find("mixed_scores"), std::string::npos) << e.what();
  }
}

}  // namespace
}  // namespace routecast
