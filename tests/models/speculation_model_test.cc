// Every kind: shapes, causality, padding, dropout, files, configurations.
#include "models/speculation_model.h"

#include <c10/core/GradMode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/errors.h"
#include "models/baseline_predictors.h"
#include "models/predictor_factory.h"
#include "speculation_test_support.h"

namespace routecast {
namespace {

class SpeculationKindTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    const c10::NoGradGuard no_grad;
    at::manual_seed(5);
    for (const auto& [name, tensor] : model_->constants().items()) tensor.normal_();
  }
  std::unique_ptr<SpeculationModel> model_ =
      MakeSpeculationModel(SmallSpeculation(GetParam()), 7);
};
INSTANTIATE_TEST_SUITE_P(Kinds, SpeculationKindTest,
                         testing::ValuesIn(SpeculationNames()),
                         [](const auto& info) { return info.param; });

fs::path Folder(const std::string& name) {
  const fs::path folder = fs::path(testing::TempDir()) / ("speculation_" + name);
  fs::remove_all(folder);
  return folder;
}

TEST_P(SpeculationKindTest, EverySourceGivesAllItsLeads) {
  const MoeGeometry g = SmallGeometry();
  const auto trace = RandomTrace(g, 6, 5, 1);
  for (Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
    for (int s = -1; s < g.layers(stack); ++s) {
      const auto out = model_->Forward(WindowOf(trace, stack, s, 5), 0);
      const int leads = stack == Stack::kEncoder ? 3 - s : 3;
      const int tokens = stack == Stack::kEncoder ? 6 : 5;
      EXPECT_THAT(out.logits_BTHE.sizes(), testing::ElementsAre(1, tokens, leads, 5));
      EXPECT_THAT(out.confidence_BTH.sizes(), testing::ElementsAre(1, tokens, leads));
      EXPECT_TRUE(at::isfinite(out.logits_BTHE).all().item<bool>());
      EXPECT_TRUE(out.confidence_BTH.ge(0)
                      .logical_and(out.confidence_BTH.le(1))
                      .all()
                      .item<bool>());
    }
  }
}

TEST_P(SpeculationKindTest, DecoderSeesNoLaterToken) {
  const c10::NoGradGuard no_grad;
  for (int s = -1; s < 3; ++s) {
    const auto window =
        WindowOf(RandomTrace(SmallGeometry(), 2, 6, 3), Stack::kDecoder, s, 5);
    const auto expected = model_->Forward(window, 0).logits_BTHE;
    for (int t = 0; t + 1 < 6; ++t) {
      RoutingWindow changed = window;
      changed.token_ids_BT = window.token_ids_BT.clone();
      changed.token_ids_BT.narrow(1, t + 1, 5 - t).add_(1).remainder_(11);
      changed.experts_BTL = window.experts_BTL.clone();
      changed.experts_BTL.narrow(1, t + 1, 5 - t).add_(1).remainder_(5);
      if (window.hidden_BTD.defined()) {
        changed.hidden_BTD = window.hidden_BTD.clone();
        changed.hidden_BTD.narrow(1, t + 1, 5 - t).neg_();
      }
      changed.context_BTD = window.context_BTD.clone();
      changed.context_BTD.narrow(1, t + 1, 5 - t).neg_();
      const auto got = model_->Forward(changed, 0).logits_BTHE;
      const auto seen = got.narrow(1, 0, t + 1), same = expected.narrow(1, 0, t + 1);
      // `moe` multiplies the rows of one expert together: how many those are depends on
      // the later tokens, and with it how a product rounds.
      EXPECT_TRUE(GetParam() == "moe" ? at::allclose(seen, same, 1e-5, 1e-6)
                                      : at::equal(seen, same))
          << "source " << s << " token " << t;
      // The last row must react, unless what changed is its own and not known at -1.
      if (t < 4) {
        EXPECT_FALSE(at::allclose(got.select(1, 5), expected.select(1, 5))) << s;
      }
    }
  }
}

TEST_P(SpeculationKindTest, NoLayerPastTheSourceIsSeen) {
  const c10::NoGradGuard no_grad;
  for (Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
    const int layers = SmallGeometry().layers(stack);
    for (int s = -1; s + 1 < layers; ++s) {
      const auto window = WindowOf(RandomTrace(SmallGeometry(), 4, 4, 5), stack, s, 5);
      RoutingWindow changed = window;
      changed.experts_BTL = window.experts_BTL.clone();
      // In the decoder earlier tokens' later layers are known: change the last row only.
      const int first = stack == Stack::kEncoder ? 0 : 3;
      changed.experts_BTL.narrow(1, first, 4 - first)
          .narrow(2, s + 1, layers - s - 1)
          .fill_(2);
      EXPECT_TRUE(at::equal(model_->Forward(changed, 0).logits_BTHE,
                            model_->Forward(window, 0).logits_BTHE));
    }
  }
}

TEST_P(SpeculationKindTest, DecoderUsesThePreviousTokensLaterLayers) {
  const c10::NoGradGuard no_grad;
  const auto window =
      WindowOf(RandomTrace(SmallGeometry(), 2, 4, 5), Stack::kDecoder, -1, 5);
  RoutingWindow changed = window;
  changed.experts_BTL = window.experts_BTL.clone();
  changed.experts_BTL.select(1, 2).select(1, 2).add_(1).remainder_(5);
  EXPECT_FALSE(at::allclose(model_->Forward(changed, 0).logits_BTHE.select(1, 3),
                            model_->Forward(window, 0).logits_BTHE.select(1, 3)));
}

TEST_P(SpeculationKindTest, PaddingChangesNothing) {
  const c10::NoGradGuard no_grad;
  const MoeGeometry g = SmallGeometry();
  for (Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
    for (int s = -1; s < g.layers(stack) - 1; ++s) {
      const auto shorter = WindowOf(RandomTrace(g, 3, 3, 8), stack, s, 5);
      const auto padded =
          BatchOf({RandomTrace(g, 3, 3, 8), RandomTrace(g, 9, 9, 9)}, stack, s, 5);
      const auto both = model_->Forward(padded, 0);
      const auto alone = model_->Forward(shorter, 0);
      EXPECT_TRUE(at::allclose(both.logits_BTHE.narrow(0, 0, 1).narrow(1, 0, 3),
                               alone.logits_BTHE, 1e-4, 1e-5));
      EXPECT_TRUE(at::isfinite(both.logits_BTHE).all().item<bool>());
    }
  }
}

// Serving takes a shorter way for a few rows: the same function up to rounding.
TEST_P(SpeculationKindTest, ServingEqualsTraining) {
  const MoeGeometry g = SmallGeometry();
  for (Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
    for (int s = -1; s < g.layers(stack); ++s) {
      const auto window =
          BatchOf({RandomTrace(g, 3, 2, 8), RandomTrace(g, 4, 3, 9)}, stack, s, 5);
      const auto expected = model_->Forward(window, 0);
      const c10::NoGradGuard no_grad;
      const auto got = model_->Forward(window, 0);
      EXPECT_TRUE(at::allclose(got.logits_BTHE, expected.logits_BTHE, 1e-4, 1e-5)) << s;
      EXPECT_TRUE(at::allclose(got.confidence_BTH, expected.confidence_BTH, 1e-4, 1e-5));
    }
  }
}

TEST_P(SpeculationKindTest, TheLastRowAloneIsTheLastRow) {
  const c10::NoGradGuard no_grad;
  const MoeGeometry g = SmallGeometry();
  for (int s = -1; s < g.decoder_layers; ++s) {
    for (const int tokens : {1, 3, 12}) {  // few rows and many
      const auto window = WindowOf(RandomTrace(g, 3, tokens, 8), Stack::kDecoder, s, 5);
      const auto all = model_->Forward(window, 0);
      const auto last = model_->ForwardLast(window);
      EXPECT_TRUE(at::allclose(last.logits_BTHE, all.logits_BTHE.narrow(1, tokens - 1, 1),
                               1e-4, 1e-5));
      EXPECT_TRUE(at::allclose(last.confidence_BTH,
                               all.confidence_BTH.narrow(1, tokens - 1, 1), 1e-4, 1e-5));
    }
  }
}

TEST_P(SpeculationKindTest, DropoutIsAFunctionOfItsKey) {
  const auto window =
      WindowOf(RandomTrace(SmallGeometry(), 6, 5, 1), Stack::kEncoder, 1, 5);
  const auto first = model_->Forward(window, 11).logits_BTHE;
  at::manual_seed(99);
  EXPECT_TRUE(at::equal(model_->Forward(window, 11).logits_BTHE, first));
  EXPECT_FALSE(at::equal(model_->Forward(window, 12).logits_BTHE, first));
  EXPECT_FALSE(at::equal(model_->Forward(window, 0).logits_BTHE, first));
}

TEST_P(SpeculationKindTest, GradientsReachEveryParameter) {
  const MoeGeometry g = SmallGeometry();
  const auto trace = RandomTrace(g, 6, 5, 1);
  at::Tensor loss;
  for (Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
    for (int s = -1; s < g.layers(stack); ++s) {
      const auto out = model_->Forward(WindowOf(trace, stack, s, 5), 5);
      const auto part = out.logits_BTHE.square().sum() + out.confidence_BTH.sum();
      loss = loss.defined() ? loss + part : part;
    }
  }
  loss.backward();
  for (const auto& [name, tensor] : model_->parameters().items()) {
    EXPECT_TRUE(tensor.grad().defined()) << name;
  }
}

TEST_P(SpeculationKindTest, FilesKeepEveryBit) {
  const fs::path folder = Folder("files_" + GetParam());
  Calibration calibration;
  calibration.Set(Stack::kDecoder, -1, 2, 1.25);
  SaveSpeculationModel(folder, *model_, calibration, Json{{"epochs", 3}});
  const auto saved = LoadSpeculationModel(folder);
  EXPECT_EQ(saved.calibration, calibration);
  EXPECT_EQ(saved.model->config(), model_->config());
  const auto window =
      WindowOf(RandomTrace(SmallGeometry(), 6, 5, 1), Stack::kDecoder, 1, 5);
  EXPECT_TRUE(at::equal(saved.model->Forward(window, 0).logits_BTHE,
                        model_->Forward(window, 0).logits_BTHE));
}

TEST_P(SpeculationKindTest, WeightsThatConfigDoesNotNameAreRefused) {
  const fs::path folder = Folder("swap_" + GetParam());
  SaveSpeculationModel(folder, *model_, {});
  WriteParameters(folder / "model.safetensors",
                  MakeSpeculationModel(model_->config(), 8)->parameters(),
                  at::ScalarType::Undefined);
  EXPECT_THROW(LoadSpeculationModel(folder), DataError);
}

TEST_P(SpeculationKindTest, CalibrationDividesTheLogits) {
  const fs::path folder = Folder("calibrated_" + GetParam());
  Calibration calibration;
  calibration.Set(Stack::kEncoder, 0, 2, 2.0);
  SaveSpeculationModel(folder, *model_, calibration);
  const auto predictor = LoadPredictor(folder.string(), SmallGeometry(), "", {});
  const auto window =
      WindowOf(RandomTrace(SmallGeometry(), 6, 5, 1), Stack::kEncoder, 0, 5);
  const auto logits = model_->Forward(window, 0).logits_BTHE;
  EXPECT_TRUE(at::allclose(*predictor->Predict(window, 2),
                           at::softmax(logits.select(2, 1) / 2.0, -1)));
  EXPECT_TRUE(at::allclose(*predictor->PredictLeads(window, 4)[0],
                           at::softmax(logits.select(2, 0), -1)));
  EXPECT_FALSE(predictor->Predict(window, 4).has_value());
}

// Training saw 11 ids: one that it did not see reads as padding does.
TEST(PredictorFactoryTest, TokenIdsThatTrainingNeverSawAreServed) {
  for (const char* kind : {"hidden", "interlayer", "contextual"}) {
    SpeculationConfig config = SmallSpeculation(kind);
    config.token_inputs = config.kind == "interlayer";
    LearnedPredictor predictor("learned", {MakeSpeculationModel(config, 3), {}});
    RoutingWindow window =
        WindowOf(RandomTrace(SmallGeometry(), 6, 5, 1), Stack::kDecoder, 0, 5);
    window.token_ids_BT = window.token_ids_BT.clone();
    window.token_ids_BT.select(1, 4).fill_(0);
    const at::Tensor all = predictor.PredictLeads(window, 1)[0]->clone(),
                     newest = predictor.PredictLast(window, 1)[0]->clone();
    window.token_ids_BT.select(1, 4).fill_(11);
    EXPECT_TRUE(at::equal(*predictor.PredictLeads(window, 1)[0], all)) << kind;
    EXPECT_TRUE(at::equal(*predictor.PredictLast(window, 1)[0], newest)) << kind;
    EXPECT_EQ(window.token_ids_BT[0][4].item<int64_t>(), 11) << "the caller's own";
  }
}

TEST(PredictorFactoryTest, TheOnlinePrefixServesTheFoldersModel) {
  const fs::path folder = Folder("online");
  const auto model = MakeSpeculationModel(SmallSpeculation("interlayer"), 3);
  SaveSpeculationModel(folder, *model, Calibration{});
  const auto plain = LoadPredictor(folder.string(), SmallGeometry(), "", {});
  const auto online = LoadPredictor("online:" + folder.string(), SmallGeometry(), "", {});
  EXPECT_EQ(online->name(), plain->name() + " online");
  const auto window =
      WindowOf(RandomTrace(SmallGeometry(), 6, 5, 1), Stack::kEncoder, 0, 5);
  EXPECT_TRUE(at::allclose(*online->Predict(window, 1), *plain->Predict(window, 1)));
  EXPECT_THROW(LoadPredictor("online:/no/such/folder", SmallGeometry(), "", {}),
               UsageError);
}

TEST(InterlayerModelTest, PriorsAreTheMarkovCounts) {
  const c10::NoGradGuard no_grad;
  const MoeGeometry g = SmallGeometry();
  BaselineTables tables(g, 11);
  for (int i = 0; i < 20; ++i) tables.Fit(RandomTrace(g, 6, 5, 30 + i));
  auto model = MakeSpeculationModel(SmallSpeculation("interlayer"), 7);
  for (const auto& [name, tensor] : model->parameters().items()) {
    if (name != "prior.gain") tensor.zero_();
  }
  model->FitPriors(tables);
  const RoutingTrace trace = RandomTrace(g, 6, 5, 99);
  // Encoder within the stack; decoder within the token and on into the next.
  struct Case {
    Stack stack;
    int source, lead;
  };
  for (const Case& c : {Case{Stack::kEncoder, 1, 2}, Case{Stack::kDecoder, 0, 1},
                        Case{Stack::kDecoder, 1, 3}}) {
    const auto window = WindowOf(trace, c.stack, c.source, 5);
    std::vector<float> expected(5);
    tables.Markov1(g.GlobalLayer(c.stack, c.source), c.lead,
                   g.GlobalLayer(c.stack, (c.source + c.lead) % g.layers(c.stack)),
                   window.experts_BTL[0][4][c.source].item<int>(), expected.data());
    const auto probs =
        at::softmax(model->Forward(window, 0).logits_BTHE[0][4][c.lead - 1], -1);
    for (int e = 0; e < 5; ++e) {
      EXPECT_NEAR(probs[e].item<float>(), expected[size_t(e)], 1e-5)
          << c.source << " " << c.lead;
    }
  }
}

TEST(SpeculationConfigTest, HostileValuesAreRefused) {
  const Json good = SmallSpeculation("interlayer").ToJson();
  EXPECT_EQ(SpeculationConfig::FromJson(good, "test"), SmallSpeculation("interlayer"));
  const std::pair<const char*, Json> changes[] = {
      {"kind", "interlayers"},
      {"kind", 3},
      {"geometry", Json::array()},
      {"width", 15},
      {"width", -4},
      {"width", 1e30},
      {"width", 1 << 29},
      {"heads", 0},
      {"heads", 3},
      {"ff", "24"},
      {"layers", 65},
      {"context", 0},
      {"context", 1 << 30},
      {"neighbours", -1},
      {"neighbours", 65},
      {"priors", 1},
      {"next_token", "yes"},
      {"dropout", 1},
      {"dropout", -0.5},
      {"dropout", nullptr},
      {"vocab_size", 18446744073709551615ULL}};
  for (const auto& [key, value] : changes) {
    Json bad = good;
    bad[key] = value;
    EXPECT_THROW(SpeculationConfig::FromJson(bad, "test"), DataError) << key << value;
  }
  for (const auto& item : good.items()) {
    Json bad = good;
    bad.erase(item.key());
    EXPECT_THROW(SpeculationConfig::FromJson(bad, "test"), DataError) << item.key();
  }
  Json huge = good;  // each size in range, their product not
  huge["geometry"]["num_experts"] = 65535;
  huge["geometry"]["encoder_layers"] = 1024;
  huge["width"] = 8192;
  EXPECT_THROW(SpeculationConfig::FromJson(huge, "test"), DataError);
}

TEST(SpeculationModelTest, UnknownKindNamesTheNearest) {
  SpeculationConfig c = SmallSpeculation("hidden");
  c.kind = "hiden";
  try {
    MakeSpeculationModel(c, 1);
    FAIL();
  } catch (const UsageError& e) {
    EXPECT_THAT(e.what(), testing::HasSubstr("hidden"));
  }
}

// The published baseline has 4,624,769 parameters; what ours adds are rows for padding,
// stacks, source layers and leads.
TEST(SpeculationModelTest, InterlayerHasThePublishedParameters) {
  MoeGeometry g{6, 6, 128, 1, 768};
  const auto model =
      MakeSpeculationModel(DefaultSpeculationConfig("interlayer", g, 32128, 768), 1);
  EXPECT_EQ(model->parameters().num_elements(), 4624769 + 256 * (1 + 2 + 7 + 6) + 12);
}

}  // namespace
}  // namespace routecast
