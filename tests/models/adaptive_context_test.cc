// Models that look at fewer layers than they could, and the predictor that gives them no
// more than they need.
#include "models/adaptive_context.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include "common/errors.h"
#include "speculation_test_support.h"

namespace routecast {
namespace {

class AdaptiveContext : public testing::TestWithParam<const char*> {
 protected:
  static SpeculationConfig Config() {
    SpeculationConfig config = SmallSpeculation(GetParam());
    config.context = 3;
    return config;
  }
  static RoutingWindow Window(Stack stack, int source) {
    return WindowOf(RandomTrace(SmallGeometry(), 6, 6, 3), stack, source, 5);
  }
  static std::unique_ptr<LearnedPredictor> Learned() {
    return std::make_unique<LearnedPredictor>(
        "learned", SavedSpeculationModel{MakeSpeculationModel(Config(), 7), {}});
  }
  const c10::NoGradGuard no_grad_;
};
INSTANTIATE_TEST_SUITE_P(Kinds, AdaptiveContext,
                         testing::Values("interlayer", "moe", "autoregressive"),
                         [](const auto& info) { return info.param; });

// Leaving layers out gives what hiding them gives: slots and positions stay theirs.
TEST_P(AdaptiveContext, FewerLayersAreTheSameAsHiddenOnes) {
  const auto model = MakeSpeculationModel(Config(), 7);
  RoutingWindow window = Window(Stack::kEncoder, 2), hidden = window;
  window.context_layers = 1;
  hidden.experts_BTL = hidden.experts_BTL.clone();
  hidden.experts_BTL.narrow(2, 0, 2).fill_(5);
  const auto all = model->Forward(Window(Stack::kEncoder, 2), 0).logits_BTHE;
  const auto less = model->Forward(window, 0).logits_BTHE;
  EXPECT_TRUE(at::allclose(less, model->Forward(hidden, 0).logits_BTHE, 1e-4, 1e-5));
  EXPECT_FALSE(at::allclose(less, all, 1e-4, 1e-5));
  // In a decoder the token before has its newest layers, too.
  window = hidden = Window(Stack::kDecoder, -1);
  window.context_layers = 1;
  hidden.experts_BTL = hidden.experts_BTL.clone();
  hidden.experts_BTL.narrow(2, 0, hidden.num_layers - 1).fill_(5);
  EXPECT_TRUE(at::allclose(model->Forward(window, 0).logits_BTHE,
                           model->Forward(hidden, 0).logits_BTHE, 1e-4, 1e-5));
}

TEST_P(AdaptiveContext, MoreLayersThanTheModelsOwnChangeNothing) {
  const auto model = MakeSpeculationModel(Config(), 7);
  RoutingWindow window = Window(Stack::kDecoder, 1);
  const auto all = model->Forward(window, 0).logits_BTHE;
  window.context_layers = 9;
  EXPECT_TRUE(at::equal(model->Forward(window, 0).logits_BTHE, all));
}

TEST_P(AdaptiveContext, EachTokenGetsLayersUntilItIsConfident) {
  RoutingWindow window = Window(Stack::kDecoder, 1);
  const auto learned = Learned();
  std::vector<at::Tensor> by_layers;
  for (int layers = 1; layers <= 3; ++layers) {
    window.context_layers = layers;
    by_layers.push_back(*learned->PredictLeads(window, 2)[0]);
  }
  window.context_layers = 0;
  const auto ask = [&](double threshold, int64_t* layers) {
    AdaptiveContextPredictor adaptive(Learned(), threshold);
    const auto probs = *adaptive.PredictLeads(window, 2)[0];
    *layers = adaptive.layers_seen();
    return probs;
  };
  int64_t layers = 0;
  EXPECT_TRUE(at::equal(ask(0, &layers), by_layers[0]));  // sure at once
  EXPECT_EQ(layers, 1);
  const auto never = ask(1.1, &layers);
  EXPECT_TRUE(at::equal(never, by_layers[2]));
  EXPECT_EQ(layers, 1 + 2 + 3);
  // Between the least and the largest confidence: some tokens stop, some go on.
  const auto first = by_layers[0].amax(-1);
  const double threshold = first.median().item<double>() + 1e-6;
  const auto mixed = ask(threshold, &layers);
  EXPECT_GT(layers, 1);
  for (int64_t t = 0; t < first.size(1); ++t) {
    const bool sure = first[0][t].item<double>() >= threshold;
    EXPECT_EQ(at::equal(mixed[0][t], by_layers[0][0][t]), sure) << t;
  }
}

TEST(AdaptiveContextLoading, IsRefusedWhereNothingIsEmbedded) {
  EXPECT_THROW(AdaptiveContextPredictor(
                   std::make_unique<LearnedPredictor>(
                       "learned",
                       SavedSpeculationModel{
                           MakeSpeculationModel(SmallSpeculation("lstm"), 7), {}}),
                   0.5),
               UsageError);
  EXPECT_THROW(LoadPredictor("adaptive_context:/no/such/folder", SmallGeometry(), "", {}),
               UsageError);
}

// Hidden experts cost something, and only they do; each member by its own.
TEST(HiddenIds, AreAskedForInTraining) {
  SpeculationConfig config = SmallSpeculation("interlayer");
  config.dropout = 0;
  RoutingWindow window =
      WindowOf(RandomTrace(SmallGeometry(), 6, 6, 3), Stack::kDecoder, 1, 5);
  const auto model = MakeSpeculationModel(config, 7);
  const auto both = KindOf("interlayer").make(config, {7, 8});
  EXPECT_FALSE(model->Forward(window, 5).own_loss.defined());
  auto& hidden = window.training.hidden_ids_BTL;
  hidden = at::full(window.experts_BTL.sizes(), -100, at::kLong);
  EXPECT_EQ(model->Forward(window, 5).own_loss.item<double>(), 0);
  window.experts_BTL = window.experts_BTL.clone();
  hidden[0][2][1] = window.experts_BTL[0][2][1].item<int64_t>();
  window.experts_BTL[0][2][1] = 5;
  const double one = model->Forward(window, 5).own_loss.item<double>();
  EXPECT_GT(one, 0);
  hidden[0][2][1] = (hidden[0][2][1].item<int64_t>() + 1) % 5;
  EXPECT_NE(model->Forward(window, 5).own_loss.item<double>(), one);
  const auto loss = both->Forward(window, 5).own_loss;
  ASSERT_EQ(loss.numel(), 2);
  EXPECT_NE(loss[0].item<double>(), loss[1].item<double>());
  EXPECT_FALSE(model->Forward(window, 0).own_loss.defined());  // serving
}

}  // namespace
}  // namespace routecast
