// `hidden` on how much each expert of the decoder will be used later.
#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include <cmath>

#include "common/errors.h"
#include "models/hidden_model.h"
#include "models/predictor_factory.h"
#include "speculation_test_support.h"

namespace routecast {
namespace {

SpeculationConfig WithLaterUse() {
  SpeculationConfig config = SmallSpeculation("hidden");
  config.later_use = true;
  return config;
}

RoutingWindow Before(const std::vector<RoutingTrace>& traces) {
  return BatchOf(traces, Stack::kDecoder, -1, SmallGeometry().num_experts);
}

TEST(LaterUseTest, IsSaidBeforeTheDecodersFirstLayerAlone) {
  const c10::NoGradGuard no_grad;
  const MoeGeometry g = SmallGeometry();
  const auto model = MakeSpeculationModel(WithLaterUse(), 3);
  const RoutingTrace trace = RandomTrace(g, 4, 5, 7);
  for (const Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
    for (int source = -1; source < g.layers(stack) - 1; ++source) {
      const auto said = model->Forward(WindowOf(trace, stack, source, g.num_experts), 0);
      EXPECT_EQ(said.later_BTLE.defined(), stack == Stack::kDecoder && source == -1);
    }
  }
  const at::Tensor later = model->Forward(Before({trace}), 0).later_BTLE;
  EXPECT_EQ(later.sizes(), at::IntArrayRef({1, 5, g.decoder_layers, g.num_experts}));
}

// A few rows take plain loops, more of them tensor calls.
TEST(LaterUseTest, IsTheSameForFewRowsAndMany) {
  const c10::NoGradGuard no_grad;
  const auto model = MakeSpeculationModel(WithLaterUse(), 3);
  const MoeGeometry g = SmallGeometry();
  std::vector<RoutingTrace> traces;
  for (uint64_t i = 0; i < 3; ++i) traces.push_back(RandomTrace(g, 4, 6, 20 + i));
  const at::Tensor many = model->Forward(Before(traces), 0).later_BTLE;
  for (size_t i = 0; i < traces.size(); ++i) {
    const at::Tensor few = model->ForwardLast(Before({traces[i]})).later_BTLE;
    ASSERT_EQ(few.size(1), 1);
    const auto row = many.narrow(0, static_cast<int64_t>(i), 1).narrow(1, 5, 1);
    EXPECT_TRUE(at::allclose(few, row, 1e-4, 1e-5));
  }
}

TEST(LaterUseTest, LossIsTheCrossEntropyOfWhatCame) {
  const MoeGeometry g = SmallGeometry();
  SpeculationConfig config = WithLaterUse();
  config.dropout = 0;
  const auto model = MakeSpeculationModel(config, 3);
  // The second is shorter: behind its end there is nothing.
  const RoutingWindow window = Before({RandomTrace(g, 4, 4, 1), RandomTrace(g, 4, 2, 2)});
  const SpeculationOutput out = model->Forward(window, /*dropout_key=*/9);
  const at::Tensor said = at::log_softmax(out.later_BTLE.detach(), 3);
  double expected = 0;
  for (int64_t b = 0; b < 2; ++b) {
    const int64_t tokens = b == 0 ? 4 : 2;
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t later = t + 1; later < tokens; ++later) {
        const double weight =
            (1 - LaterUse::kDiscount) *
            std::pow(LaterUse::kDiscount, static_cast<double>(later - t - 1));
        for (int64_t l = 0; l < g.decoder_layers; ++l) {
          const auto expert = window.experts_BTL[b][later][l].item<int64_t>();
          expected -= weight * said[b][t][l][expert].item<double>();
        }
      }
    }
  }
  EXPECT_NEAR(out.own_loss.sum().item<double>(), LaterUse::kWeight * expected, 1e-5);
  out.own_loss.sum().backward();
  EXPECT_GT(model->parameters().Get("later_use.weight").grad().abs().sum().item<double>(),
            0);
}

TEST(LaterUseTest, APredictorSaysSharesThatSumToOne) {
  const MoeGeometry g = SmallGeometry();
  LearnedPredictor predictor("hidden",
                             {MakeSpeculationModel(WithLaterUse(), 3), Calibration{}});
  EXPECT_FALSE(predictor.LaterUse().has_value());
  const RoutingTrace trace = RandomTrace(g, 4, 5, 7);
  predictor.PredictLast(Before({trace}), 2);
  const std::optional<at::Tensor> said = predictor.LaterUse();
  ASSERT_TRUE(said.has_value());
  EXPECT_EQ(said->sizes(), at::IntArrayRef({1, g.decoder_layers, g.num_experts}));
  EXPECT_TRUE(at::allclose(said->sum(2), at::ones({1, g.decoder_layers})));
  predictor.PredictLast(WindowOf(trace, Stack::kDecoder, 0, g.num_experts), 2);
  EXPECT_FALSE(predictor.LaterUse().has_value()) << "of an earlier question";
}

TEST(LaterUseTest, StandsInTheConfigurationAndIsOfHiddenAlone) {
  const SpeculationConfig config = WithLaterUse();
  EXPECT_TRUE(SpeculationConfig::FromJson(config.ToJson(), "test").later_use);
  EXPECT_FALSE(SmallSpeculation("hidden").ToJson().contains("later_use"));
  SpeculationConfig other = SmallSpeculation("interlayer");
  other.later_use = true;
  EXPECT_THROW(SpeculationConfig::FromJson(other.ToJson(), "test"), DataError);
}

}  // namespace
}  // namespace routecast
