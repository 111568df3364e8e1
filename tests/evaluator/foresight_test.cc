// Serving a predictor pass by pass gives what training saw in the recorded sequence.
#include "evaluator/foresight.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include <stdexcept>
#include <utility>

#include "models/predictor_factory.h"
#include "tests/models/speculation_test_support.h"

namespace routecast {
namespace {

class ForesightTest : public testing::Test {
 protected:
  ForesightTest()
      : trace_(RandomTrace(g_, 7, 9, 4)),
        predictor_("hidden",
                   {MakeSpeculationModel(SmallSpeculation("hidden"), 3), Calibration{}}),
        reference_(MakeSpeculationModel(SmallSpeculation("hidden"), 3)) {}

  at::Tensor Hidden(Stack stack, int layer) const {
    return WindowOf(trace_, stack, layer, g_.num_experts).hidden_BTD;
  }

  LayerRouting RoutingOf(Stack stack, int layer, int64_t from, int64_t count) const {
    const RoutingWindow window = WindowOf(trace_, stack, layer, g_.num_experts);
    LayerRouting routing;
    routing.layer = g_.GlobalLayer(stack, layer);
    routing.input_BTD = window.hidden_BTD.narrow(1, from, count).contiguous();
    routing.expert_ids_BT = window.experts_BTL.select(2, layer).narrow(1, from, count);
    return routing;
  }

  PassInfo Pass(Stack stack, int64_t from, int64_t count) const {
    const RoutingWindow window = WindowOf(trace_, stack, -1, g_.num_experts);
    PassInfo pass;
    pass.stack = stack;
    pass.token_ids_BT = window.token_ids_BT.narrow(1, from, count).contiguous();
    pass.valid_BT = window.valid_BT.narrow(1, from, count).contiguous();
    pass.first_position = static_cast<int>(from);
    return pass;
  }

  // Every answer of a decoder pass against the recorded window's row.
  void ExpectRow(const std::vector<LayerForecast>& forecasts, int source, int64_t token) {
    const RoutingWindow window =
        WindowOf(trace_, Stack::kDecoder, source, g_.num_experts);
    const c10::NoGradGuard no_grad;
    const at::Tensor probs =
        at::softmax(reference_->Forward(window, 0).logits_BTHE, -1)[0][token];
    ASSERT_EQ(static_cast<int64_t>(forecasts.size()), probs.size(0));
    for (size_t i = 0; i < forecasts.size(); ++i) {
      const int target = (source + 1 + static_cast<int>(i)) % g_.decoder_layers;
      EXPECT_EQ(forecasts[i].layer, g_.GlobalLayer(Stack::kDecoder, target));
      for (int e = 0; e < g_.num_experts; ++e) {
        EXPECT_NEAR(forecasts[i].probabilities[static_cast<size_t>(e)],
                    probs[static_cast<int64_t>(i)][e].item<float>(), 1e-4)
            << "source " << source << " token " << token << " lead " << i + 1;
      }
    }
  }

  void Decode(PredictorForesight* foresight, bool replay) {
    const RoutingWindow source = WindowOf(trace_, Stack::kDecoder, -1, g_.num_experts);
    for (int64_t t = 0; t < 9; ++t) {
      PassInfo pass = Pass(Stack::kDecoder, t, 1);
      if (replay) {
        pass.source_BSD = source.source_BSD;
        pass.source_valid_BS = source.source_valid_BS;
      }
      if (t == 4) {  // what is only heard of, not asked about, leaves no gap
        foresight->SkipPass(pass);
      } else {
        ExpectRow(foresight->AtPassBegin(pass), -1, t);
      }
      for (int l = 0; l < g_.decoder_layers; ++l) {
        const LayerRouting routing = RoutingOf(Stack::kDecoder, l, t, 1);
        if (t == 4) {
          foresight->Skip(routing);
        } else {
          ExpectRow(foresight->AtLayer(routing), l, t);
        }
      }
    }
  }

  MoeGeometry g_ = SmallGeometry();
  RoutingTrace trace_;
  LearnedPredictor predictor_;
  std::unique_ptr<SpeculationModel> reference_;
};

TEST_F(ForesightTest, AfterTheEncodersPassStepsSeeWhatTrainingSaw) {
  PredictorForesight foresight(&predictor_, g_, 8);
  for (int sequence = 0; sequence < 2; ++sequence) {  // the second begins afresh
    foresight.AtPassBegin(Pass(Stack::kEncoder, 0, 7));
    for (int l = 0; l < g_.encoder_layers; ++l) {
      foresight.AtLayer(RoutingOf(Stack::kEncoder, l, 0, 7));
    }
    Decode(&foresight, false);
  }
}

TEST_F(ForesightTest, AReplaysStepsSeeWhatTrainingSaw) {
  PredictorForesight foresight(&predictor_, g_, 8);
  Decode(&foresight, true);
}

// A kind that keeps what it computed of the tokens before, asked in the runtime's order.
TEST_F(ForesightTest, KeptTokensChangeNoAnswer) {
  LearnedPredictor keeps(
      "interlayer",
      {MakeSpeculationModel(SmallSpeculation("interlayer"), 3), Calibration{}});
  keeps.PrepareServing();
  reference_ = MakeSpeculationModel(SmallSpeculation("interlayer"), 3);
  PredictorForesight foresight(&keeps, g_, 8);
  for (int sequence = 0; sequence < 2; ++sequence) Decode(&foresight, false);
}

// The head whose scores are largest for the id that the output names.
at::Tensor OneHotHead() { return at::eye(11); }
at::Tensor OutputNaming(int64_t id) {
  at::Tensor output = at::zeros({1, 1, 11});
  output[0][0][id] = 1;
  return output;
}

class EarlyForesightTest : public ForesightTest {
 protected:
  PassInfo First() const {
    const RoutingWindow source = WindowOf(trace_, Stack::kDecoder, -1, g_.num_experts);
    PassInfo pass = Pass(Stack::kDecoder, 0, 1);
    pass.source_BSD = source.source_BSD;
    pass.source_valid_BS = source.source_valid_BS;
    return pass;
  }
  // Decodes token 0 and ends its pass with an output that names `id`.
  std::vector<LayerForecast> EndOfFirst(PredictorForesight* foresight, int64_t id) {
    PassInfo pass = First();
    foresight->AtPassBegin(pass);
    for (int l = 0; l < g_.decoder_layers; ++l) {
      const auto said = foresight->AtLayer(RoutingOf(Stack::kDecoder, l, 0, 1));
      EXPECT_EQ(said.empty(), l + 1 == g_.decoder_layers) << l;
    }
    pass.output_BTD = OutputNaming(id);
    return foresight->AtPassEnd(pass);
  }
  int64_t SecondToken() const { return trace_.decoder.token_ids[1]; }
  std::shared_ptr<const NextTokenGuess> guess_ =
      std::make_shared<NextTokenGuess>(OneHotHead());
};

TEST_F(EarlyForesightTest, ARightGuessIsTheNextPassQuestionAskedEarlier) {
  PredictorForesight early(&predictor_, g_, 8, guess_);
  ExpectRow(EndOfFirst(&early, SecondToken()), -1, 1);
  EXPECT_TRUE(early.AtPassBegin(Pass(Stack::kDecoder, 1, 1)).empty());
  // The window goes on as if nothing had been asked.
  ExpectRow(early.AtLayer(RoutingOf(Stack::kDecoder, 0, 1, 1)), 0, 1);
}

TEST_F(EarlyForesightTest, AWrongGuessIsAskedAgain) {
  PredictorForesight early(&predictor_, g_, 8, guess_);
  EXPECT_FALSE(EndOfFirst(&early, (SecondToken() + 1) % 11).empty());
  ExpectRow(early.AtPassBegin(Pass(Stack::kDecoder, 1, 1)), -1, 1);
}

TEST_F(EarlyForesightTest, ARowThatHasEndedAsksNothingAgain) {
  PredictorForesight early(&predictor_, g_, 8, guess_);
  EndOfFirst(&early, (SecondToken() + 1) % 11);
  PassInfo ended = Pass(Stack::kDecoder, 1, 1);
  ended.valid_BT = at::zeros({1, 1}, at::kBool);
  EXPECT_TRUE(early.AtPassBegin(ended).empty());
}

TEST_F(EarlyForesightTest, AGuessBeforeASkippedPassAnswersNoLaterOne) {
  PredictorForesight early(&predictor_, g_, 8, guess_);
  EndOfFirst(&early, trace_.decoder.token_ids[2]);
  early.SkipPass(Pass(Stack::kDecoder, 1, 1));
  for (int l = 0; l < g_.decoder_layers; ++l) {
    early.Skip(RoutingOf(Stack::kDecoder, l, 1, 1));
  }
  ExpectRow(early.AtPassBegin(Pass(Stack::kDecoder, 2, 1)), -1, 2);
}

TEST_F(EarlyForesightTest, WithoutAnOutputTheLastLayerIsAskedAtTheEnd) {
  PredictorForesight early(&predictor_, g_, 8, guess_);
  PassInfo pass = First();
  early.AtPassBegin(pass);
  for (int l = 0; l < g_.decoder_layers; ++l) {
    early.AtLayer(RoutingOf(Stack::kDecoder, l, 0, 1));
  }
  ExpectRow(early.AtPassEnd(pass), g_.decoder_layers - 1, 0);
}

// Throws where it is asked with a window of two tokens, once; remembers the window.
class StumblingPredictor : public ExpertPredictor {
 public:
  std::string name() const override { return "stumbling"; }
  bool needs_hidden() const override { return false; }
  int history_tokens() const override { return 4; }
  std::optional<at::Tensor> Predict(const RoutingWindow& window, int) override {
    const int64_t tokens = window.token_ids_BT.size(1);
    if (tokens == 2 && !std::exchange(stumbled, true)) throw std::runtime_error("oh");
    ids = window.token_ids_BT.clone();
    return at::zeros({1, tokens, window.num_experts});
  }
  bool stumbled = false;
  at::Tensor ids;
};

TEST_F(EarlyForesightTest, AGuessThatFailsLeavesNoTokenInTheWindow) {
  StumblingPredictor predictor;
  PredictorForesight early(&predictor, g_, 8, guess_);
  EXPECT_THROW(EndOfFirst(&early, (SecondToken() + 1) % 11), std::runtime_error);
  EXPECT_FALSE(early.AtPassBegin(Pass(Stack::kDecoder, 1, 1)).empty());
  const at::Tensor both = Pass(Stack::kDecoder, 0, 2).token_ids_BT;
  EXPECT_TRUE(at::equal(predictor.ids, both)) << predictor.ids;
}

TEST_F(ForesightTest, WithoutAGuessNothingIsAskedAtTheEnd) {
  PredictorForesight foresight(&predictor_, g_, 8);
  PassInfo pass = Pass(Stack::kDecoder, 0, 1);
  foresight.AtPassBegin(pass);
  pass.output_BTD = OutputNaming(1);
  EXPECT_TRUE(foresight.AtPassEnd(pass).empty());
}

TEST_F(ForesightTest, LaterUseIsToldWithThePassThatItIsSaidAt) {
  SpeculationConfig config = SmallSpeculation("hidden");
  config.later_use = true;
  LearnedPredictor predictor("hidden", {MakeSpeculationModel(config, 3), Calibration{}});
  PredictorForesight foresight(&predictor, g_, 2);
  const auto forecasts = foresight.AtPassBegin(Pass(Stack::kDecoder, 0, 1));
  std::vector<int> layers;
  for (const LayerForecast& forecast : forecasts) {
    if (forecast.distance != LayerForecast::kLater) continue;
    layers.push_back(forecast.layer);
    double sum = 0;
    for (const float share : forecast.probabilities) sum += share;
    EXPECT_NEAR(sum, 1, 1e-5);
  }
  ASSERT_EQ(static_cast<int>(layers.size()), g_.decoder_layers);
  EXPECT_EQ(layers.front(), g_.GlobalLayer(Stack::kDecoder, 0));
  for (const LayerForecast& forecast :
       foresight.AtLayer(RoutingOf(Stack::kDecoder, 0, 0, 1))) {
    EXPECT_NE(forecast.distance, LayerForecast::kLater);
  }
}

}  // namespace
}  // namespace routecast
