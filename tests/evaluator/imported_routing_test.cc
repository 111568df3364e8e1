// Imported routing of several experts a token, without token ids: predictors are asked
// about it in a simulation and for quality, and see what the trainer sees.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>

#include "common/errors.h"
#include "common/files.h"
#include "common/run_record.h"
#include "evaluator/foresight.h"
#include "evaluator/policy_simulation.h"
#include "evaluator/predictor_set.h"
#include "evaluator/quality.h"
#include "models/speculation_model.h"
#include "storage/import.h"

namespace routecast {
namespace {

using testing::ElementsAre;
using testing::FloatNear;
using testing::HasSubstr;
using testing::Pointwise;

constexpr int kLayers = 3, kTokens = 12, kRequests = 100;

// Groups of K experts; a token takes one group a layer, and each visit takes the third
// group after the one before it, on through the tokens. So a visit's set says the next
// one, and a layer meets all eight groups in turn before one comes again, also from one
// request to the next.
struct Chain {
  int chosen = 2;  // K
  static constexpr int kGroups = 8;
  int experts() const { return kGroups * chosen; }
  int Group(int request, int token, int layer) const {
    return (4 * request + 3 * (token * kLayers + layer)) % kGroups;
  }
  int At(int request, int token, int layer, int k) const {
    return Group(request, token, layer) * chosen + (k + token) % chosen;
  }
};

class ImportedRouting : public testing::Test {
 protected:
  ImportedRouting()
      : folder_(fs::path(testing::TempDir()) /
                ("imported_routing_test." + std::to_string(::getpid()))) {
    fs::create_directories(folder_);
  }
  ~ImportedRouting() override { fs::remove_all(folder_); }

  TraceReader Import(const Chain& chain) {
    std::string lines;
    for (int r = 0; r < kRequests; ++r) {
      Json routing = Json::array();
      for (int t = 0; t < kTokens; ++t) {
        Json token = Json::array();
        for (int l = 0; l < kLayers; ++l) {
          Json experts = Json::array();
          for (int k = 0; k < chain.chosen; ++k) experts.push_back(chain.At(r, t, l, k));
          token.push_back(experts);
        }
        routing.push_back(token);
      }
      lines += Json{{"routing", routing}}.dump() + "\n";
    }
    WriteFileAtomic(folder_ / "in.jsonl", lines);
    ImportTraces(folder_ / "in.jsonl", folder_ / "store",
                 {.format = "jsonl", .num_experts = chain.experts()});
    return TraceReader(folder_ / "store", NeedTokens::kNo);
  }
  static std::vector<std::unique_ptr<ExpertPredictor>> Make(
      const TraceReader& reader, const std::vector<std::string>& names,
      const std::vector<std::string>& asked) {
    return MakePredictors(names, asked, reader.config().geometry, {}, &reader, true,
                          ToldBy(reader));
  }
  static std::string Refusal(const TraceReader& reader,
                             const std::vector<std::string>& names) {
    try {
      Make(reader, names, names);
    } catch (const UsageError& e) {
      return e.what();
    } catch (const DataError& e) {
      return std::string("bad data: ") + e.what();
    }
    return "";
  }
  fs::path folder_;
};

// Brings an expert in half the time that the model works between two layers.
DeviceProfile FastLink() {
  DeviceProfile profile;
  profile.link_bytes_per_second = 1e11;
  profile.memory_bytes_per_second = 1e11;
  return profile;
}

class SetSizes : public ImportedRouting, public testing::WithParamInterface<int> {};

// A quarter of the experts fits: LRU has lost each group when its turn comes. What Markov
// says of the next visit is certain, so that it is there in time but for each first
// visit.
TEST_P(SetSizes, MarkovBringsWhatItKnows) {
  const Chain chain{GetParam()};
  const TraceReader reader = Import(chain);
  PolicySimulationOptions options;
  options.evictions = {"lru", "belady"};
  options.question_seconds = 0;
  const auto result = SimulatePolicies(
      reader, Make(reader, {"frequency", "markov"}, {"markov"}), FastLink(), options);
  ASSERT_EQ(result.rows.size(), 5u);
  EXPECT_EQ(result.slots, kLayers * chain.experts() / 4);
  const SimulatedRow &lru = result.rows[0], &belady = result.rows[1],
                     &frequency = result.rows[2], &markov = result.rows[3],
                     &oracle = result.rows[4];
  EXPECT_EQ(lru.hit_rate, 0);
  const double uses = static_cast<double>(result.tokens) * kLayers * chain.chosen;
  const double expert = 8.0 * options.d_model * static_cast<double>(options.d_ff);
  EXPECT_EQ(static_cast<double>(lru.bytes_useful), uses * expert);
  EXPECT_GT(belady.hit_rate, 0);
  EXPECT_LT(belady.bytes_useful, lru.bytes_useful);
  EXPECT_LT(frequency.hit_rate, 0.5) << "it knows nothing of the next visit";
  // All but a request's first visits, whose experts nothing foretells.
  EXPECT_GE(markov.hit_rate, 1 - 1. / (kTokens * kLayers) - 1e-9);
  EXPECT_LE(markov.hit_rate, oracle.hit_rate);
  EXPECT_LE(markov.speed_up, oracle.speed_up + 1e-9);
  EXPECT_GT(markov.speed_up, lru.speed_up);
  EXPECT_EQ(oracle.hit_rate, 1);
}

// Every answer one visit ahead is right, of every choice; frequency is right by chance.
TEST_P(SetSizes, QualityIsOfTheWholeSet) {
  const Chain chain{GetParam()};
  const TraceReader reader = Import(chain);
  QualityOptions options;
  options.quiet = true;
  const auto all =
      MeasureQuality(reader, Make(reader, {"markov", "frequency"}, {"markov"}), options);
  ASSERT_EQ(all.size(), 2u);
  for (const QualityScores& place : all[0].places) {
    const LeadScores& s = place.scores;
    ASSERT_EQ(s.by_choice.size(), static_cast<size_t>(chain.chosen));
    if (s.layer < 0) continue;  // a request's first visits are not known
    EXPECT_NEAR(s.recall, 1, 1e-9) << s.layer << " " << s.lead;
    EXPECT_NEAR(s.recall_twice, 1, 1e-9);
    EXPECT_NEAR(s.cross_entropy, std::log(chain.chosen), 0.05);
    EXPECT_LT(s.ece, 0.05) << "the likeliest is one of the set for sure";
    EXPECT_LT(place.ece_equal_mass, 0.05);
    EXPECT_EQ(place.agreement.rows(), 0);
  }
  for (const QualityScores& place : all[1].places) EXPECT_LT(place.scores.recall, 0.3);
  EXPECT_THAT(QualityTable(all), HasSubstr("at 2K"));
  const Json entry = all[0].ToJson()["scores"][0];
  EXPECT_TRUE(entry.contains("recall_at_2k"));
  EXPECT_EQ(entry["recall_by_choice"].size(), static_cast<size_t>(chain.chosen));
}

INSTANTIATE_TEST_SUITE_P(OfTokens, SetSizes, testing::Values(2, 4));

TEST_F(ImportedRouting, WhoNeedsWhatWasNotRecordedIsRefusedByName) {
  const TraceReader reader = Import({2});
  for (const char* name : {"token_table", "token_patterns", "mixed_scores"}) {
    const std::string refusal = Refusal(reader, {"markov", name});
    EXPECT_THAT(refusal, HasSubstr(std::string(name) + " needs token ids"));
    EXPECT_EQ(std::count(refusal.begin(), refusal.end(), '\n'), 2) << refusal;
  }
  for (const char* name : {"stale_gate", "adaptive"}) {
    EXPECT_THAT(Refusal(reader, {name}),
                HasSubstr(std::string(name) + " needs router inputs"));
  }
  for (const char* name : {"frequency", "markov", "previous_token", "pattern",
                           "layer_minus_1", "multi_layer", "recent_frequency"}) {
    EXPECT_EQ(Refusal(reader, {name}), "");
  }
}

// Those that come along unasked are left out instead.
TEST_F(ImportedRouting, BaselinesThatCannotBeServedAreLeftOut) {
  const TraceReader reader = Import({2});
  std::vector<std::string> names;
  for (const auto& predictor : Make(reader, WithBaselines({}, "all"), {}))
    names.push_back(predictor->name());
  EXPECT_THAT(names, ElementsAre("frequency", "markov", "previous_token", "layer_minus_1",
                                 "multi_layer", "pattern", "recent_frequency"));
}

TEST_F(ImportedRouting, ATrainedRunMustBeOfAsManyExpertsAToken) {
  const TraceReader reader = Import({2});
  const auto save = [&](const char* name, const char* kind, int chosen, int vocabulary) {
    MoeGeometry g = reader.config().geometry;
    g.experts_per_token = chosen;
    SpeculationConfig config = DefaultSpeculationConfig(kind, g, vocabulary, 0);
    config.width = 16;
    config.heads = 2;
    config.ff = 24;
    SaveSpeculationModel(folder_ / name, *MakeSpeculationModel(config, 1), {});
    return (folder_ / name).string();
  };
  EXPECT_EQ(Refusal(reader, {save("own", "interlayer", 2, 0)}), "");
  EXPECT_EQ(Refusal(reader, {save("ids", "interlayer", 2, 11)}), "")
      << "it was trained on a store with ids, and reads none";
  const std::string other = Refusal(reader, {save("other", "interlayer", 1, 0)});
  EXPECT_THAT(other, HasSubstr("belongs to another model"));
  EXPECT_THAT(other, HasSubstr("16 experts, 1 a token"));
  EXPECT_THAT(Refusal(reader, {save("hidden", "hidden", 2, 11)}),
              HasSubstr("hidden needs token ids"));
}

TEST_F(ImportedRouting, AModelWithoutAnEncoderHasNoEncoderPhase) {
  const TraceReader reader = Import({2});
  PolicySimulationOptions options;
  options.encoder = true;
  try {
    SimulatePolicies(reader, {}, FastLink(), options);
    FAIL() << "was simulated";
  } catch (const UsageError& e) {
    EXPECT_THAT(e.what(), HasSubstr("no encoder"));
    EXPECT_THAT(e.what(), HasSubstr("leave --phase=both out"));
  }
}

// Says the same of everything, and keeps the windows that it was asked with.
class Witness final : public ExpertPredictor {
 public:
  explicit Witness(std::vector<float> answer) : answer_(std::move(answer)) {}
  std::string name() const override { return "witness"; }
  bool needs_hidden() const override { return false; }
  int history_tokens() const override { return 5; }
  std::optional<at::Tensor> Predict(const RoutingWindow& window, int) override {
    asked.push_back(window);
    return at::tensor(answer_).expand({1, window.token_ids_BT.size(1), -1}).contiguous();
  }
  std::vector<RoutingWindow> asked;

 private:
  std::vector<float> answer_;
};

// A share of the four choices becomes the chance that a token takes the expert.
TEST(ForesightOfSetsTest, AShareOfTheChoicesBecomesTheChanceOfUse) {
  const MoeGeometry g{0, 1, 5, 4, 8};
  RoutingTrace trace;
  trace.decoder.num_tokens = 2;
  trace.decoder.num_layers = 1;
  trace.decoder.expert_ids = {0, 4};
  trace.decoder.top_k = 4;
  trace.decoder.topk_ids = {0, 1, 2, 3, 4, 3, 2, 1};
  Witness witness({0.4f, 0.25f, 0.2f, 0.1f, 0.05f});
  PredictorForesight foresight(&witness, g, 1);
  std::vector<SimulatedVisit> visits;
  AppendVisits(trace, g, 2, {}, &foresight, &visits);
  ASSERT_EQ(visits.size(), 2u);
  for (const SimulatedVisit& visit : visits) {
    ASSERT_EQ(visit.at_layer.size(), 1u);
    EXPECT_THAT(visit.at_layer[0].probabilities,
                Pointwise(FloatNear(1e-6f), {1.f, 1.f, 0.8f, 0.4f, 0.2f}));
  }
}

// Every choice of what is known, as WindowsOf gives it to training.
TEST_F(ImportedRouting, ServedWindowsHoldEveryChoice) {
  const TraceReader reader = Import({4});
  const MoeGeometry& g = reader.config().geometry;
  const RoutingTrace trace =
      reader.Read(reader.sequences()[1].sequence_id, WithHidden::kNo);
  Witness witness(std::vector<float>(static_cast<size_t>(g.num_experts), 0.f));
  PredictorForesight foresight(&witness, g, 1);
  std::vector<SimulatedVisit> visits;
  AppendVisits(trace, g, kTokens, {}, &foresight, &visits);
  ASSERT_EQ(witness.asked.size(), static_cast<size_t>(kTokens * (kLayers + 1)));
  for (const RoutingWindow& served : witness.asked) {
    const RoutingWindow whole =
        WindowOf(trace, Stack::kDecoder, served.source_layer, g.num_experts, 4);
    const int64_t tokens = served.token_ids_BT.size(1), first = served.first_token;
    const int64_t known = served.source_layer + 1;
    const auto expect = [&](const at::Tensor& is, const at::Tensor& all) {
      const at::Tensor is_to_be = all.narrow(1, first, tokens);
      EXPECT_TRUE(
          at::equal(is.narrow(1, 0, tokens - 1), is_to_be.narrow(1, 0, tokens - 1)));
      const at::Tensor newest = is.select(1, tokens - 1);
      EXPECT_TRUE(at::equal(newest.narrow(1, 0, known),
                            is_to_be.select(1, tokens - 1).narrow(1, 0, known)));
      EXPECT_TRUE(
          newest.narrow(1, known, kLayers - known).eq(g.num_experts).all().item<bool>());
    };
    expect(served.experts_BTL, whole.experts_BTL);
    ASSERT_TRUE(served.others_BTLK.defined());
    expect(served.others_BTLK, whole.others_BTLK);
  }
}

}  // namespace
}  // namespace routecast
