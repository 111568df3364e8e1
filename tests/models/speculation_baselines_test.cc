// Counting predictors against naive counts, and the stale gate against its control.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

#include "common/errors.h"
#include "models/baseline_predictors.h"
#include "models/predictor_factory.h"
#include "speculation_test_support.h"

namespace routecast {
namespace {

constexpr int kVocabulary = 11;

std::vector<RoutingTrace> Traces() {
  std::vector<RoutingTrace> traces;
  for (uint64_t i = 0; i < 12; ++i)
    traces.push_back(RandomTrace(SmallGeometry(), 7, 6, i));
  return traces;
}

std::shared_ptr<const BaselineTables> Fitted() {
  auto tables = std::make_shared<BaselineTables>(SmallGeometry(), kVocabulary);
  for (const RoutingTrace& trace : Traces()) tables->Fit(trace);
  return tables;
}

at::Tensor PredictRow(const std::string& name, const RoutingWindow& window, int lead,
                      int token) {
  const auto predictor = MakeBaseline(name, Fitted(), SmallGeometry(), {});
  return (*predictor->Predict(window, lead))[0][token];
}

// Counts of what followed wherever `holds(span, t)`; the label is at (t + shift, layer).
// Tokens that capacity dropped have no label.
at::Tensor Naive(Stack stack, int layer, int shift,
                 const std::function<bool(const RoutingSpan&, int)>& holds) {
  auto counts = at::zeros({5});
  for (const RoutingTrace& trace : Traces()) {
    const RoutingSpan& s = stack == Stack::kEncoder ? trace.encoder : trace.decoder;
    for (int t = 0; t + shift < s.num_tokens; ++t) {
      const int at = layer * s.num_tokens + t + shift;
      if (holds(s, t) && !s.dropped[at]) counts[s.expert_ids[at]] += 1;
    }
  }
  return counts;
}

at::Tensor Backoff(const at::Tensor& counts, double weight, const at::Tensor& below) {
  return (counts + weight * below) / (counts.sum() + weight);
}

at::Tensor NaiveFrequency(Stack stack, int layer) {
  return Backoff(Naive(stack, layer, 0, [](auto&, int) { return true; }), 0.5,
                 at::full({5}, 0.2));
}

int Expert(const RoutingSpan& s, int t, int l) {
  return s.expert_ids[l * s.num_tokens + t];
}

TEST(BaselineTest, FrequencyCounts) {
  const auto window = WindowOf(Traces()[0], Stack::kEncoder, 0, 5);
  EXPECT_TRUE(at::allclose(PredictRow("frequency", window, 2, 3),
                           NaiveFrequency(Stack::kEncoder, 2)));
}

TEST(BaselineTest, TokenTableBacksOffToFrequency) {
  const auto trace = Traces()[0];
  auto window = WindowOf(trace, Stack::kDecoder, 0, 5);
  const auto f = NaiveFrequency(Stack::kDecoder, 2);
  const uint32_t id = trace.decoder.token_ids[3];
  const auto counts = Naive(Stack::kDecoder, 2, 0, [&](const RoutingSpan& s, int t) {
    return s.token_ids[t] == id;
  });
  EXPECT_TRUE(
      at::allclose(PredictRow("token_table", window, 2, 3), Backoff(counts, 0.5, f)));
  window.token_ids_BT.fill_(1 << 20);  // never seen
  EXPECT_TRUE(at::allclose(PredictRow("token_table", window, 2, 3), f));
  // lead 3 from layer 0 is layer 0 of the next token, whose id is not known
  EXPECT_TRUE(at::allclose(PredictRow("token_table", window, 3, 3),
                           NaiveFrequency(Stack::kDecoder, 0)));
}

TEST(BaselineTest, MarkovOrderOneAtALongLead) {
  const auto trace = Traces()[0];
  const auto window = WindowOf(trace, Stack::kEncoder, 1, 5);
  const int now = Expert(trace.encoder, 3, 1);
  const auto counts = Naive(Stack::kEncoder, 3, 0, [&](const RoutingSpan& s, int t) {
    return Expert(s, t, 1) == now;
  });
  EXPECT_TRUE(at::allclose(PredictRow("pattern", window, 2, 3),
                           Backoff(counts, 2, NaiveFrequency(Stack::kEncoder, 3))));
}

TEST(BaselineTest, MarkovOrderTwoGoesOnInTheNextToken) {
  const auto trace = Traces()[0];
  // Source -1 of token 3: the newest known layers are 1 and 2 of token 2.
  const auto window = WindowOf(trace, Stack::kDecoder, -1, 5);
  const int before = Expert(trace.decoder, 2, 1), now = Expert(trace.decoder, 2, 2);
  const auto one = Naive(Stack::kDecoder, 0, 1, [&](const RoutingSpan& s, int t) {
    return Expert(s, t, 2) == now;
  });
  const auto two = Naive(Stack::kDecoder, 0, 1, [&](const RoutingSpan& s, int t) {
    return Expert(s, t, 2) == now && Expert(s, t, 1) == before;
  });
  const auto f = NaiveFrequency(Stack::kDecoder, 0);
  EXPECT_TRUE(at::allclose(PredictRow("markov", window, 1, 3),
                           Backoff(two, 2, Backoff(one, 2, f))));
  EXPECT_TRUE(at::allclose(PredictRow("markov", window, 1, 0), f));
}

// From layer 0 of token 3 two layers on, and three: the next token's layer 0.
TEST(BaselineTest, MarkovOfOrderTwoAtEveryLead) {
  const auto trace = Traces()[0];
  const auto window = WindowOf(trace, Stack::kDecoder, 0, 5);
  const int before = Expert(trace.decoder, 2, 2), now = Expert(trace.decoder, 3, 0);
  for (const int lead : {2, 3}) {
    const int layer = lead % 3, shift = 1 + lead / 3;  // from token 2, the one before
    const auto one =
        Naive(Stack::kDecoder, layer, lead / 3,
              [&](const RoutingSpan& s, int t) { return Expert(s, t, 0) == now; });
    const auto two =
        Naive(Stack::kDecoder, layer, shift, [&](const RoutingSpan& s, int t) {
          return Expert(s, t, 2) == before && Expert(s, t + 1, 0) == now;
        });
    ASSERT_GT(two.sum().item<float>(), 0);
    const auto f = NaiveFrequency(Stack::kDecoder, layer);
    EXPECT_TRUE(at::allclose(PredictRow("markov", window, lead, 3),
                             Backoff(two, 2, Backoff(one, 2, f))))
        << lead;
  }
}

TEST(BaselineTest, PreviousTokenAtTheSameLayer) {
  const auto trace = Traces()[0];
  const auto window = WindowOf(trace, Stack::kDecoder, 0, 5);
  const int before = Expert(trace.decoder, 2, 2);
  const auto counts = Naive(Stack::kDecoder, 2, 1, [&](const RoutingSpan& s, int t) {
    return Expert(s, t, 2) == before;
  });
  EXPECT_TRUE(at::allclose(PredictRow("previous_token", window, 2, 3),
                           Backoff(counts, 2, NaiveFrequency(Stack::kDecoder, 2))));
  const auto predictor = MakeBaseline("previous_token", Fitted(), SmallGeometry(), {});
  EXPECT_FALSE(predictor->Predict(WindowOf(trace, Stack::kEncoder, 0, 5), 1));
}

TEST(BaselineTest, CarriedIdsKeepTheirWeights) {
  const auto trace = Traces()[0];
  const auto window = WindowOf(trace, Stack::kEncoder, 1, 5);
  auto expected = at::full({5}, 0.02);
  expected[Expert(trace.encoder, 3, 1)] += 0.9 * 0.4 / 0.7;
  expected[Expert(trace.encoder, 3, 0)] += 0.9 * 0.3 / 0.7;
  EXPECT_TRUE(at::allclose(PredictRow("multi_layer", window, 1, 3), expected));
}

// No predictor may look at what is not known yet.
TEST(BaselineTest, NoneSeesTheFuture) {
  const auto tables = Fitted();
  for (const std::string& name : BaselineNames()) {
    if (name == "stale_gate") continue;
    const auto predictor = MakeBaseline(name, tables, SmallGeometry(), {});
    for (int s = -1; s < 3; ++s) {
      const auto window = WindowOf(Traces()[1], Stack::kDecoder, s, 5);
      RoutingWindow changed = window;
      changed.experts_BTL = window.experts_BTL.clone();
      changed.experts_BTL.select(1, 3).narrow(1, s + 1, 2 - s).fill_(5);
      changed.experts_BTL.narrow(1, 4, 2).fill_(5);
      for (int lead = 1; lead <= 3; ++lead) {
        const auto probs = (*predictor->Predict(window, lead))[0].narrow(0, 0, 4);
        EXPECT_TRUE(
            at::equal((*predictor->Predict(changed, lead))[0].narrow(0, 0, 4), probs))
            << name << s << lead;
        EXPECT_TRUE(at::allclose(probs.sum(-1), at::ones({4}))) << name;
      }
    }
  }
}

// The runtime keeps history_tokens() newest tokens: the last row must not need more.
TEST(BaselineTest, HistoryIsEnough) {
  const auto tables = Fitted();
  for (const std::string& name : BaselineNames()) {
    if (name == "stale_gate") continue;
    const auto predictor = MakeBaseline(name, tables, SmallGeometry(), {});
    const int kept = predictor->history_tokens();
    for (int s = -1; s < 3; ++s) {
      const auto window = WindowOf(Traces()[1], Stack::kDecoder, s, 5);
      RoutingWindow tail = window;
      tail.token_ids_BT = window.token_ids_BT.narrow(1, 6 - kept, kept);
      tail.valid_BT = window.valid_BT.narrow(1, 6 - kept, kept);
      tail.experts_BTL = window.experts_BTL.narrow(1, 6 - kept, kept);
      if (s >= 0) tail.hidden_BTD = window.hidden_BTD.narrow(1, 6 - kept, kept);
      EXPECT_TRUE(at::equal((*predictor->Predict(tail, 1))[0][kept - 1],
                            (*predictor->Predict(window, 1))[0][5]))
          << name << s;
    }
  }
}

// Above 2^24 a float that is counted up by one stays where it is.
TEST(BaselineTest, LargeCountsGoOn) {
  const MoeGeometry g = {0, 1, 2, 1, 4};
  BaselineTables tables(g, 0);
  RoutingTrace trace;
  trace.decoder.num_layers = 1;
  trace.decoder.num_tokens = 1 << 12;
  trace.decoder.expert_ids.assign(1 << 12, 0);
  tables.Fit(trace);
  for (int i = 0; i < 13; ++i) tables.Merge(BaselineTables(tables));  // doubled
  trace.decoder.num_tokens = 2;
  trace.decoder.expert_ids = {0, 0};
  for (int i = 0; i < 500; ++i) tables.Fit(trace);
  const double before = (1 << 25) - (1 << 13);  // the first of a sequence follows nothing
  EXPECT_EQ(tables.Markov1Count(0, 1, 0), before + 500);
  const fs::path file = fs::path(testing::TempDir()) / "large.safetensors";
  tables.Save(file);
  EXPECT_EQ(BaselineTables::Load(file).Markov1Count(0, 1, 0), before + 500);
}

// A file of version 1: rows of all experts' counts, order 2 without a lead in its keys.
Parameters FirstVersion() {
  Parameters tensors;
  tensors.Add("geometry", at::tensor({int64_t{0}, int64_t{2}, int64_t{3}, int64_t{1},
                                      int64_t{4}, int64_t{0}}));
  tensors.Add("frequency", at::ones({2, 3}));
  for (const char* name : {"token", "previous", "markov1"}) {
    tensors.Add(std::string(name) + ".keys", at::empty({0}, at::kLong));
    tensors.Add(std::string(name) + ".counts", at::empty({0, 3}));
  }
  tensors.Add("markov2.keys", at::tensor({int64_t{(1 * 3 + 2) * 3 + 1}}));
  tensors.Add("markov2.counts", at::tensor({0.f, 6.f, 2.f}).view({1, 3}));
  return tensors;
}

TEST(BaselineTest, ReadsFilesOfTheFirstVersion) {
  const fs::path file = fs::path(testing::TempDir()) / "first.safetensors";
  WriteParameters(file, FirstVersion(), at::ScalarType::Undefined);
  const BaselineTables tables = BaselineTables::Load(file);
  float probs[3];  // order 1 is the even frequency
  tables.Markov2(/*source=*/1, /*lead=*/1, /*target=*/0, /*before=*/2, /*expert=*/1,
                 probs);
  EXPECT_FLOAT_EQ(probs[0], (2 / 3.f) / 10);
  EXPECT_FLOAT_EQ(probs[1], (6 + 2 / 3.f) / 10);
  EXPECT_FLOAT_EQ(probs[2], (2 + 2 / 3.f) / 10);
  tables.Markov2(1, /*lead=*/2, 1, 2, 1, probs);  // was not counted then
  EXPECT_FLOAT_EQ(probs[1], 1 / 3.f);
}

TEST(BaselineTest, DamagedRowsAreRefused) {
  const fs::path file = fs::path(testing::TempDir()) / "damaged.safetensors";
  const auto fails_with = [&](const std::string& name, const at::Tensor& value) {
    Fitted()->Save(file);
    const Parameters whole = ReadParameters(file, at::ScalarType::Undefined);
    Parameters damaged;
    for (const auto& [key, tensor] : whole.items()) {
      damaged.Add(key, key == name ? value : tensor);
    }
    WriteParameters(file, damaged, at::ScalarType::Undefined);
    try {
      BaselineTables::Load(file);
    } catch (const DataError& error) {
      return std::string(error.what()).find(name) != std::string::npos;
    }
    return false;
  };
  Fitted()->Save(file);
  const Parameters whole = ReadParameters(file, at::ScalarType::Undefined);
  EXPECT_TRUE(fails_with("token.ends", whole.Get("token.ends") + 1000000));
  at::Tensor falling = whole.Get("token.ends").clone();
  falling[-1] = 0;
  EXPECT_TRUE(fails_with("token.ends", falling));
  EXPECT_TRUE(fails_with("token.keys", at::zeros_like(falling))) << "one key twice";
  EXPECT_TRUE(fails_with("token.experts", at::zeros_like(whole.Get("token.experts"))));
  EXPECT_TRUE(fails_with("markov1.ends", whole.Get("token.ends")));
  EXPECT_TRUE(fails_with("markov2.experts", whole.Get("markov2.experts") + 5));
  EXPECT_TRUE(fails_with("markov2.counts", whole.Get("markov2.counts") - 1000));
  EXPECT_TRUE(fails_with("previous.counts", whole.Get("previous.counts").to(at::kFloat)));
}

// Its keys would be layers and experts squared: more than memory holds.
TEST(BaselineTest, LargeGeometriesHaveNoOrderTwoBeyondTheNextLayer) {
  const MoeGeometry g = {0, 3, 1000, 1, 4};
  BaselineTables tables(g, 0);
  RoutingTrace trace;
  trace.decoder.num_layers = 3;
  trace.decoder.num_tokens = 1;
  trace.decoder.expert_ids = {1, 2, 3};
  tables.Fit(trace);
  std::vector<float> one(1000), two(1000);
  tables.Markov1(1, 1, 2, 2, one.data());
  tables.Markov2(1, 1, 2, 1, 2, two.data());
  EXPECT_GT(two[3], one[3]);
  trace.decoder.num_tokens = 2;
  trace.decoder.expert_ids = {1, 4, 2, 5, 3, 6};
  tables.Fit(trace);
  tables.Markov1(1, 2, 0, 2, one.data());
  tables.Markov2(1, 2, 0, 1, 2, two.data());
  EXPECT_EQ(one, two);
}

TEST(BaselineTest, FilesAndMergedRanksGiveTheSameCounts) {
  const fs::path folder = fs::path(testing::TempDir());
  BaselineTables first(SmallGeometry(), kVocabulary), second = first;
  const auto traces = Traces();
  for (size_t i = 0; i < traces.size(); ++i) (i % 3 ? first : second).Fit(traces[i]);
  first.Merge(second);
  first.Save(folder / "merged.safetensors");
  BaselineTables::Load(folder / "merged.safetensors").Save(folder / "again.safetensors");
  Fitted()->Save(folder / "whole.safetensors");
  EXPECT_EQ(ReadFile(folder / "merged.safetensors"),
            ReadFile(folder / "whole.safetensors"));
  EXPECT_EQ(ReadFile(folder / "again.safetensors"),
            ReadFile(folder / "whole.safetensors"));
}

TEST(BaselineTest, WrongInputIsRefused) {
  BaselineTables tables(SmallGeometry(), kVocabulary);
  auto trace = Traces()[0];
  trace.encoder.expert_ids[2] = 5;
  EXPECT_THROW(tables.Fit(trace), DataError);
  trace = Traces()[0];
  trace.decoder.token_ids[0] = kVocabulary;
  EXPECT_THROW(tables.Fit(trace), DataError);
  EXPECT_THROW(LoadPredictor("markof", SmallGeometry(), "", {}), UsageError);
  EXPECT_THROW(LoadPredictor("markov", SmallGeometry(), "", {}), UsageError);
  EXPECT_THROW(LoadPredictor("no/folder", SmallGeometry(), "", {}), UsageError);
  EXPECT_THROW(LoadPredictor("stale_gate", SmallGeometry(), "", {}), UsageError);
  const fs::path file = fs::path(testing::TempDir()) / "counts.safetensors";
  Fitted()->Save(file);
  MoeGeometry other = SmallGeometry();
  other.num_experts = 6;
  EXPECT_THROW(LoadPredictor("markov", other, file, {}), DataError);
}

std::vector<RouterWeights> Routers(const MoeGeometry& g) {
  std::vector<RouterWeights> routers;
  for (int l = 0; l < g.num_layers(); ++l) {
    routers.push_back(
        {at::randn({g.num_experts, g.d_model}), {}, at::rand({g.d_model}) + 0.5});
  }
  return routers;
}

// States as the model makes them: RMS-normed, times the layer's gain, stored as bf16.
TEST(StaleGateTest, DistanceZeroIsAlwaysRight) {
  at::manual_seed(3);
  MoeGeometry g = SmallGeometry();
  g.d_model = 32;
  const auto routers = Routers(g);
  RoutingSpan span;
  span.num_tokens = 200;
  span.num_layers = g.encoder_layers;
  span.hidden_width = g.d_model;
  span.token_ids.assign(200, 1);
  for (int l = 0; l < g.encoder_layers; ++l) {
    const auto state = at::randn({200, g.d_model});
    const auto x =
        (state * (state.square().mean(-1, true) + 1e-6).rsqrt() * routers[l].norm_gain_D)
            .to(at::kBFloat16)
            .to(at::kFloat);
    const auto choice = at::linear(x, routers[l].weight_ED).argmax(-1);
    for (int t = 0; t < 200; ++t) {
      span.expert_ids.push_back(static_cast<uint16_t>(choice[t].item<int64_t>()));
      for (int d = 0; d < g.d_model; ++d) {
        span.hidden.push_back(FloatToBf16(x[t][d].item<float>()));
      }
    }
  }
  RoutingTrace trace;
  trace.encoder = span;
  StaleGatePredictor gate(g, routers);
  for (int s = 0; s < g.encoder_layers; ++s) {
    const auto window = WindowOf(trace, Stack::kEncoder, s, g.num_experts);
    EXPECT_TRUE(
        at::equal(gate.PredictLead0(window).argmax(-1), window.experts_BTL.select(2, s)))
        << s;
  }
  EXPECT_FALSE(gate.Predict(WindowOf(trace, Stack::kEncoder, -1, 5), 1));
}

// Where the state does not change between layers, the target's choice is exact.
TEST(StaleGateTest, GainsAreExchanged) {
  at::manual_seed(4);
  MoeGeometry g = SmallGeometry();
  const auto routers = Routers(g);
  const auto normed = at::randn({1, 50, g.d_model});
  RoutingWindow window;
  window.stack = Stack::kDecoder;
  window.source_layer = 0;
  window.num_layers = g.decoder_layers;
  window.num_experts = g.num_experts;
  window.hidden_BTD = normed * routers[4].norm_gain_D;
  const auto expected =
      at::softmax(at::linear(normed * routers[6].norm_gain_D, routers[6].weight_ED), -1);
  StaleGatePredictor gate(g, routers);
  EXPECT_TRUE(at::allclose(*gate.Predict(window, 2), expected, 1e-4, 1e-5));
  EXPECT_FALSE(gate.Predict(window, 3));  // the next token's state is not there
}

}  // namespace
}  // namespace routecast
