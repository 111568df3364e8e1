// Each statistic against a slow count of the same traces, and against stores whose
// answer is known.
#include <algorithm>
#include <cmath>
#include <set>

#include "storage/statistics_routing.h"
#include "tests/storage/store_fixture.h"

namespace routecast {
namespace {

using Counts = std::map<std::vector<int>, double>;

double Bits(const Counts& counts) {
  double total = 0, bits = 0;
  for (const auto& [value, c] : counts) total += c;
  for (const auto& [value, c] : counts) bits -= c / total * std::log2(c / total);
  return bits;
}

// 2 I(X; Y) / (H(X) + H(Y)) over all tokens; `value` gives x and y of a token.
template <typename Value>
double SlowNmi(const std::map<uint64_t, RoutingTrace>& all, const Value& value) {
  Counts x, y, joint;
  for (const auto& [id, trace] : all) {
    for (int t = 0; t < trace.decoder.num_tokens; ++t) {
      const std::pair<int, int> v = value(trace.decoder, t);
      ++x[{v.first}], ++y[{v.second}], ++joint[{v.first, v.second}];
    }
  }
  double information = 0, n = 0;
  for (const auto& [v, c] : joint) n += c;
  for (const auto& [v, c] : joint) {
    information += c / n * std::log2(c * n / (x[{v[0]}] * y[{v[1]}]));
  }
  return 2 * information / (Bits(x) + Bits(y));
}

int Expert(const RoutingSpan& s, int layer, int t) {
  return s.expert_ids[static_cast<size_t>(layer * s.num_tokens + t)];
}

class RoutingStatisticsTest : public TraceStoreTest {
 protected:
  RoutingStatisticsTest() {
    shape_.num_experts = 5;
    config_ = ConfigOf(shape_, 4, kChunks);
  }
  RoutingStatistics Compute() {
    return ComputeRoutingStatistics(TraceReader(store(), NeedTokens::kNo));
  }
  // A store of one sequence with these experts [L][T] in the decoder.
  RoutingStatistics Of(const std::vector<std::vector<int>>& experts, int num_experts) {
    StoreConfig config = config_;
    config.geometry = {0, static_cast<int>(experts.size()), num_experts, 1, 8};
    config.num_chunks = 1;
    config.num_shards = 1;
    TraceStore::CreateOrOpen(store(), config);
    RoutingTrace trace;
    trace.decoder.num_layers = static_cast<int>(experts.size());
    trace.decoder.num_tokens = static_cast<int>(experts[0].size());
    for (const auto& layer : experts) {
      trace.decoder.expert_ids.insert(trace.decoder.expert_ids.end(), layer.begin(),
                                      layer.end());
    }
    for (size_t t = 0; t < experts[0].size(); ++t) {
      trace.decoder.token_ids.push_back(static_cast<uint32_t>(t % 2));
    }
    ChunkWriter writer(store(), config, 0, "t");
    writer.Add(trace);
    writer.Finish();
    ShardOwner(store(), config, 0, 1).Ingest(0, "t");
    return Compute();
  }
};

TEST_F(RoutingStatisticsTest, InformationAgreesWithASlowCount) {
  Fill();
  const RoutingStatistics stats = Compute();
  const auto all = All();
  const RoutingLayer& last = stats.layers.at(5);  // decoder layer 2
  ASSERT_EQ(last.nmi_previous.size(), 2u);
  for (int back = 1; back <= 2; ++back) {
    EXPECT_NEAR(last.nmi_previous[static_cast<size_t>(back - 1)],
                SlowNmi(all,
                        [&](const RoutingSpan& s, int t) {
                          return std::pair(Expert(s, 2 - back, t), Expert(s, 2, t));
                        }),
                1e-9);
  }
  EXPECT_NEAR(last.nmi_token,
              SlowNmi(all,
                      [](const RoutingSpan& s, int t) {
                        return std::pair(
                            static_cast<int>(s.token_ids[static_cast<size_t>(t)]),
                            Expert(s, 2, t));
                      }),
              1e-9);
  EXPECT_TRUE(stats.layers[3].nmi_previous.empty());  // the stack's first layer
  EXPECT_TRUE(stats.layers[3].transitions.empty());
}

TEST_F(RoutingStatisticsTest, ManyExpertsCountAsFewDo) {
  shape_.num_experts = 300;  // beyond the dense counters
  config_ = ConfigOf(shape_, 4, kChunks);
  Fill();
  const RoutingStatistics stats = Compute();
  EXPECT_NEAR(
      stats.layers.at(4).nmi_previous.at(0),
      SlowNmi(All(), [](const RoutingSpan& s,
                        int t) { return std::pair(Expert(s, 0, t), Expert(s, 1, t)); }),
      1e-9);
  EXPECT_TRUE(stats.layers[4].transitions.empty());
}

TEST_F(RoutingStatisticsTest, InformationOfKnownRoutings) {
  // Layer 1 is a permutation of layer 0, layer 2 constant, layer 3 independent of 1.
  const RoutingStatistics stats =
      Of({{0, 0, 1, 1}, {1, 1, 0, 0}, {2, 2, 2, 2}, {0, 1, 0, 1}}, 3);
  EXPECT_NEAR(stats.layers[1].nmi_previous[0], 1, 1e-12);
  EXPECT_NEAR(stats.layers[2].nmi_previous[0], 0, 1e-12);
  EXPECT_NEAR(stats.layers[3].nmi_previous[1], 0, 1e-12);
  EXPECT_NEAR(stats.layers[3].nmi_token, 1, 1e-12);  // token ids alternate as well
  EXPECT_NEAR(stats.layers[0].nmi_token, 0, 1e-12);
}

TEST_F(RoutingStatisticsTest, TransitionsAgreeWithASlowCount) {
  Fill();
  std::map<std::pair<int, int>, uint64_t> expected;
  for (const auto& [id, trace] : All()) {
    for (int t = 0; t < trace.encoder.num_tokens; ++t) {
      ++expected[{Expert(trace.encoder, 0, t), Expert(trace.encoder, 1, t)}];
    }
  }
  const std::vector<uint64_t> counted = Compute().layers.at(1).transitions;
  ASSERT_EQ(counted.size(), 25u);
  for (int from = 0; from < 5; ++from) {
    for (int to = 0; to < 5; ++to) {
      EXPECT_EQ(counted[static_cast<size_t>(from * 5 + to)], (expected[{from, to}]));
    }
  }
}

TEST_F(RoutingStatisticsTest, JourneysAgreeWithASlowCount) {
  Fill();
  Counts expected;
  uint64_t tokens = 0;
  for (const auto& [id, trace] : All()) {
    for (int t = 0; t < trace.decoder.num_tokens; ++t, ++tokens) {
      ++expected[{Expert(trace.decoder, 0, t), Expert(trace.decoder, 1, t),
                  Expert(trace.decoder, 2, t)}];
    }
  }
  const Journeys j = Compute().decoder;
  EXPECT_EQ(j.tokens, tokens);
  EXPECT_EQ(j.distinct, expected.size());
  EXPECT_EQ(j.uncounted, 0u);
  ASSERT_EQ(j.paths.size(), std::min(kListedPaths, expected.size()));
  std::vector<double> counts;
  for (const auto& [path, c] : expected) counts.push_back(c);
  std::sort(counts.rbegin(), counts.rend());
  for (size_t i = 0; i < j.paths.size(); ++i) {
    const std::vector<int> path(j.paths[i].experts.begin(), j.paths[i].experts.end());
    EXPECT_EQ(static_cast<double>(j.paths[i].count), expected[path]);
    EXPECT_EQ(static_cast<double>(j.paths[i].count), counts[i]);
  }
}

TEST_F(RoutingStatisticsTest, SamplesAreTokensOfTheStore) {
  Fill();
  const RoutingStatistics stats = Compute();
  const auto all = All();
  std::set<uint64_t> sequences;
  for (const SampledPath& p : stats.samples) {
    sequences.insert(p.sequence_id);
    const RoutingTrace& trace = all.at(p.sequence_id);
    const RoutingSpan& s = p.stack == Stack::kEncoder ? trace.encoder : trace.decoder;
    EXPECT_EQ(p.token_id, s.token_ids.at(static_cast<size_t>(p.position)));
    ASSERT_EQ(p.experts.size(), 3u);
    for (int l = 0; l < 3; ++l) {
      EXPECT_EQ(p.experts[static_cast<size_t>(l)], Expert(s, l, p.position));
    }
  }
  EXPECT_EQ(sequences.size(), 18u);  // every third of 54
}

TEST(LoadSpreadTest, AgreesWithTheFormulas) {
  const std::vector<uint64_t> counts = {4, 0, 10, 2, 0, 8};
  const LoadSpread s = SpreadOf(counts);
  double mean = 0, m2 = 0, m3 = 0, m4 = 0, bits = 0;
  for (const uint64_t c : counts) mean += static_cast<double>(c) / 6;
  for (const uint64_t c : counts) {
    const double d = static_cast<double>(c) - mean;
    m2 += std::pow(d, 2) / 6, m3 += std::pow(d, 3) / 6, m4 += std::pow(d, 4) / 6;
    const double p = static_cast<double>(c) / 24;
    if (c > 0) bits -= p * std::log2(p);
  }
  EXPECT_EQ(s.total, 24u);
  EXPECT_NEAR(s.mean, 4, 1e-12);
  EXPECT_NEAR(s.deviation, std::sqrt(m2), 1e-12);
  EXPECT_NEAR(s.cv, std::sqrt(m2) / 4, 1e-12);
  EXPECT_NEAR(s.skewness, m3 / std::pow(m2, 1.5), 1e-12);
  EXPECT_NEAR(s.kurtosis, m4 / (m2 * m2), 1e-12);
  EXPECT_NEAR(s.diversity, std::exp2(bits) / 6, 1e-12);
  // Sorted 0 0 2 4 8 10: quartiles at places 1.25, 2.5 and 3.75, as NumPy has them.
  EXPECT_NEAR(s.q1, 0.5, 1e-12);
  EXPECT_NEAR(s.median, 3, 1e-12);
  EXPECT_NEAR(s.q3, 7, 1e-12);
  EXPECT_NEAR(s.iqr, 6.5, 1e-12);
  EXPECT_EQ(s.min, 0);
  EXPECT_EQ(s.max, 10);
  EXPECT_EQ(s.active, 4);
  EXPECT_EQ(s.zero, 2);
}

TEST(LoadSpreadTest, EvenLoadHasNoSpread) {
  const LoadSpread s = SpreadOf({7, 7, 7});
  EXPECT_EQ(s.deviation, 0);
  EXPECT_EQ(s.skewness, 0);
  EXPECT_NEAR(s.diversity, 1, 1e-12);
  EXPECT_EQ(SpreadOf({0, 0}).diversity, 0);
}

// As --task=encode leaves the decoder's: no entropy of 0 bits, which is one expert's.
TEST_F(RoutingStatisticsTest, OfLayersWithoutTokensNothingIsKnown) {
  config_.num_chunks = 1;
  Create();
  {
    ChunkWriter writer(store(), config_, 0, "t");
    RoutingTrace trace = RandomTrace(1, shape_);
    trace.decoder = {};
    writer.Add(trace);
    writer.Finish();
    ShardOwner(store(), config_, 0, 1).Ingest(0, "t");
  }
  const fs::path out = folder_.path() / "stats";
  const TraceReader reader(store());
  WriteAllStatistics(ComputeStatistics(reader), ComputeRoutingStatistics(reader), out);
  const Json json = ReadJsonFile(out / "stats.json");
  EXPECT_TRUE(json["layers"][2]["entropy_bits"].is_number());
  EXPECT_EQ(json["layers"][2]["nmi_previous"].size(), 2u);
  for (const int l : {3, 4, 5}) {
    const Json& layer = json["layers"][static_cast<size_t>(l)];
    EXPECT_EQ(layer["tokens"], 0);
    EXPECT_TRUE(layer["entropy_bits"].is_null());
    EXPECT_TRUE(layer["conditional_entropy_bits"].is_null());
    EXPECT_TRUE(layer["nmi_previous"].empty());
  }
}

TEST_F(RoutingStatisticsTest, AreWritten) {
  Fill();
  const fs::path out = folder_.path() / "stats";
  const TraceReader reader(store());
  WriteAllStatistics(ComputeStatistics(reader), ComputeRoutingStatistics(reader), out);
  const Json json = ReadJsonFile(out / "stats.json");
  EXPECT_EQ(json["layers"].size(), 6u);
  EXPECT_EQ(json["layers"][5]["nmi_previous"].size(), 2u);
  EXPECT_TRUE(json["layers"][5]["entropy_bits"].is_number());
  EXPECT_TRUE(json["layers"][5]["percentiles"]["margins"].contains("p90"));
  const Json& spread = json["layers"][0]["spread"];
  EXPECT_EQ(spread["active"], 5);
  EXPECT_NEAR(spread["utilisation"], 1 - spread["cv"].get<double>(), 1e-12);
  EXPECT_GT(json["journeys"]["decoder"]["paths"].size(), 10u);
  EXPECT_EQ(ReadFile(out / "load.csv").substr(0, 25), "layer_id,expert_id,count\n");
  const std::string transitions = ReadFile(out / "transitions.csv");
  EXPECT_EQ(transitions.substr(0, 44), "layer_id,previous_expert_id,expert_id,count\n");
  // Four layers with one before, 25 pairs each (all occur).
  EXPECT_EQ(std::count(transitions.begin(), transitions.end(), '\n'), 101);
}

}  // namespace
}  // namespace routecast
