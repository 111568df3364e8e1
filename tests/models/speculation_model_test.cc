// Every kind: shapes, causality, padding, dropout, files, configurations.
#include "models/speculation_model.h"

#include <c10/core/GradMode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>

#include "common/errors.h"
#include "models/baseline_predictors.h"
#include "models/predictor_factory.h"
#include "models/small_math.h"
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
                         testing::ValuesIn(SpeculationKinds()),
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

// The largest difference between what is served and what was trained, in probability.
TEST(HiddenModelTest, ServedFromNarrowWeightsSaysNearlyTheSame) {
  const c10::NoGradGuard no_grad;
  const auto model = MakeSpeculationModel(SmallSpeculation("hidden"), 3);
  const auto served = MakeSpeculationModel(SmallSpeculation("hidden"), 3);
  served->PrepareServing();
  double largest = 0;
  bool same = true;
  for (int s = -1; s < 3; ++s) {
    for (int t = 1; t < 6; ++t) {
      const auto window =
          WindowOf(RandomTrace(SmallGeometry(), 4, t, 5), Stack::kDecoder, s, 5);
      const auto a = at::softmax(model->ForwardLast(window).logits_BTHE, -1);
      const auto b = at::softmax(served->ForwardLast(window).logits_BTHE, -1);
      largest = std::max(largest, (a - b).abs().max().item<double>());
      same = same && at::equal(a, b);
    }
  }
  EXPECT_LT(largest, 0.01);
  EXPECT_FALSE(same) << "the narrow weights were not used";
}

TEST(NarrowMatrixTest, ProductsAreWithinHalfAScaleOfEachWeight) {
  constexpr int kOut = 5, kIn = 77, kRows = 3;
  const auto weight = at::randn({kOut + 2, kIn}), x = at::randn({kRows, kIn});
  const auto bias = at::randn({kOut});
  const NarrowMatrix narrow(weight.const_data_ptr<float>(), kOut + 2, kIn);
  auto y = at::empty({kRows, kOut});
  DenseRows(x.const_data_ptr<float>(), kRows, narrow, 2, bias.const_data_ptr<float>(),
            kOut, y.data_ptr<float>());
  const auto exact = at::addmm(bias, x, weight.narrow(0, 2, kOut).t());
  for (int r = 0; r < kRows; ++r) {
    const double reach = x[r].abs().sum().item<double>() / 2;
    for (int o = 0; o < kOut; ++o) {
      EXPECT_NEAR(y[r][o].item<double>(), exact[r][o].item<double>(),
                  reach * narrow.scale[static_cast<size_t>(o + 2)] + 1e-4);
    }
  }
}

TEST(NarrowMatrixTest, ARowOfZerosStaysZero) {
  const std::vector<float> zeros(8, 0.f), x(8, 1.f);
  const NarrowMatrix narrow(zeros.data(), 1, 8);
  const float bias = 2;
  float y = 0;
  DenseRows(x.data(), 1, narrow, 0, &bias, 1, &y);
  EXPECT_EQ(y, 2.f);
}

// A model whose weights are all zero says what the counts say.
TEST(HiddenModelTest, PriorsAreTheCounts) {
  const c10::NoGradGuard no_grad;
  const MoeGeometry g = SmallGeometry();
  BaselineTables tables(g, 11);
  for (int i = 0; i < 20; ++i) tables.Fit(RandomTrace(g, 6, 5, 30 + i));
  auto model = MakeSpeculationModel(SmallSpeculation("hidden"), 7);
  for (const auto& [name, tensor] : model->parameters().items()) {
    if (name != "prior.gain") tensor.zero_();
  }
  model->FitPriors(tables);
  const RoutingTrace trace = RandomTrace(g, 6, 5, 99);
  std::vector<float> expected(5);
  const auto expect = [&](const RoutingWindow& window, int token, int lead) {
    const auto probs =
        at::softmax(model->Forward(window, 0).logits_BTHE[0][token][lead - 1], -1);
    for (int e = 0; e < 5; ++e) {
      EXPECT_NEAR(probs[e].item<float>(), expected[size_t(e)], 1e-5) << lead;
    }
  };
  const auto encoder = WindowOf(trace, Stack::kEncoder, 0, 5);
  tables.Token(2, encoder.token_ids_BT[0][3].item<int64_t>(), expected.data());
  expect(encoder, 3, 2);
  // Decoder of 3 layers, source 1: lead 1 in the own token, lead 3 in the next.
  const auto decoder = WindowOf(trace, Stack::kDecoder, 1, 5);
  tables.Token(g.encoder_layers + 2, decoder.token_ids_BT[0][4].item<int64_t>(),
               expected.data());
  expect(decoder, 4, 1);
  tables.Markov1(g.encoder_layers + 1, 3, g.encoder_layers + 1,
                 decoder.experts_BTL[0][4][1].item<int>(), expected.data());
  expect(decoder, 4, 3);
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

TEST(SpeculationModelTest, HiddenPredictsATokenBetweenLayers) {
  MoeGeometry g{6, 6, 128, 1, 768};
  const auto model =
      MakeSpeculationModel(DefaultSpeculationConfig("hidden", g, 32128, 768), 1);
  RoutingTrace trace;
  trace.decoder.num_tokens = 1;
  trace.decoder.num_layers = 6;
  trace.decoder.token_ids = {17};
  trace.decoder.expert_ids.assign(6, 3);
  trace.decoder.hidden_width = 768;
  trace.decoder.hidden.assign(6 * 768, FloatToBf16(0.5f));
  const auto window = WindowOf(trace, Stack::kDecoder, 2, 128);
  const c10::NoGradGuard no_grad;
  double best = 1e9;
  for (int i = 0; i < 300; ++i) {
    const auto start = std::chrono::steady_clock::now();
    model->Forward(window, 0);
    const std::chrono::duration<double, std::micro> us =
        std::chrono::steady_clock::now() - start;
    best = std::min(best, us.count());
  }
  RecordProperty("best_us", static_cast<int>(best));
  std::printf("hidden, one token, 6 leads, E=128: %.1f us\n", best);
  EXPECT_LT(best, 2000);  // a gross regression; the target of 150 us is a benchmark's
}

}  // namespace
}  // namespace routecast
