#include "evaluator/comparison.h"

#include <ATen/ATen.h>

#include <set>

#include "common/errors.h"
#include "evaluator/replay.h"
#include "gtest/gtest.h"
#include "tests/evaluator/comparison_fixture.h"

namespace routecast {
namespace {

TEST(RowInTurnTest, ARowFollowsEachNeighbourInTurn) {
  std::set<size_t> before_row_1, turns;
  for (size_t i = 0; i < 64; ++i) {
    const auto row = [&](size_t t) { return RowInTurn(t, static_cast<int>(i / 8), 8); };
    turns.insert(i / 8 * 8 + row(i % 8));
    if (i % 8 > 0 && row(i % 8) == 1) before_row_1.insert(row(i % 8 - 1));
  }
  EXPECT_EQ(turns.size(), 64u) << "each row once a round";
  EXPECT_EQ(before_row_1, (std::set<size_t>{0, 2}));
}

TEST_F(ComparisonTest, AllRowsPutOutTheSameBits) {
  SignalPredictor predictor(traces_);
  const ComparisonResult result = Compare({&predictor});
  // on-demand without cache, LRU, predictor, oracle, resident; encoder and decoder.
  ASSERT_EQ(result.rows.size(), 10u);
  std::set<std::string> hashes;
  for (const RowResult& row : result.rows) hashes.insert(row.output_sha256);
  EXPECT_EQ(hashes.size(), 1u);
  EXPECT_TRUE(result.lossless);
  EXPECT_EQ(hashes.begin()->size(), 64u);
}

TEST_F(ComparisonTest, RowsKeepTheirBudget) {
  const ComparisonResult result = Compare({});
  for (const RowResult& row : result.rows) {
    EXPECT_LE(row.held_bytes_peak, row.budget_bytes) << row.policy;
    EXPECT_EQ(row.pairs, 3);
    EXPECT_GT(row.tokens_per_second, 0);
  }
}

TEST_F(ComparisonTest, RowsSayWhatBecameOfPrefetchesAndHowRoundsSpread) {
  SignalPredictor predictor(traces_);
  for (const RowResult& row : Compare({&predictor}).rows) {
    const bool speculates = row.predictor != "none";
    EXPECT_LE(row.prefetch_timely, row.prefetch_precision) << row.predictor;
    EXPECT_LE(row.prefetch_precision, 1) << row.predictor;
    EXPECT_LE(row.prefetch_recall, 1) << row.predictor;
    if (!speculates) {
      EXPECT_EQ(row.prefetch_recall, 0) << row.policy;
    }
    if (row.predictor == "oracle" && row.phase == Stack::kDecoder) {
      EXPECT_GT(row.prefetch_recall, 0);
      EXPECT_GT(row.prefetch_timely, 0);
    }
    EXPECT_EQ(row.speed_up_spread[2], row.speed_up) << row.policy;
    for (const FiveNumbers& spread :
         {row.speed_up_spread, row.compute_ms_spread, row.stall_ms_spread}) {
      EXPECT_TRUE(std::is_sorted(spread.begin(), spread.end())) << row.policy;
    }
    const bool baseline = row.policy == "on_demand" && row.eviction == "lru";
    EXPECT_EQ(row.effect_size == 0, baseline) << row.policy;  // over itself: none
    EXPECT_TRUE(row.speed_up_spread[0] <= 1 || row.effect_size > 0) << row.policy;
    EXPECT_TRUE(row.speed_up_spread[4] >= 1 || row.effect_size < 0) << row.policy;
    EXPECT_GT(row.compute_ms_spread[0], 0) << row.policy;
    EXPECT_EQ(row.stall_ms_spread[4] > 0, row.stall_seconds > 0) << row.policy;
  }
}

TEST_F(ComparisonTest, AWarmStartIsPaidBeforeTheFirstStepAndSaysWhatItCost) {
  options_.link = "native";
  options_.warmup_rounds = 0;
  options_.rounds = 1;
  replay_.encoder = false;
  const ComparisonResult cold = Compare({});
  std::vector<uint64_t> counts(24, 0);
  for (const auto& trace : SyntheticTraces(traces_, 1, 1)) {
    for (size_t i = 0; i < trace.decoder.expert_ids.size(); ++i) {
      const auto layer = static_cast<int>(i) / trace.decoder.num_tokens;
      const bool at_once = static_cast<int>(i) % trace.decoder.num_tokens == 0;
      counts[static_cast<size_t>(6 * (2 + layer) + trace.decoder.expert_ids[i])] +=
          at_once ? 100 : 1;
    }
  }
  options_.warm_start =
      std::make_shared<UseShares>(SharesOf(counts, traces_.geometry, "counted"));
  const ComparisonResult warm = Compare({});
  EXPECT_EQ(warm.rows[0].output_sha256, cold.rows[0].output_sha256);
  for (const RowResult& row : warm.rows) {
    const bool filled = row.policy != "resident" && row.eviction != "none";
    EXPECT_EQ(row.warm_start, filled ? "counted" : "") << row.policy;
    EXPECT_EQ(row.warm_start_experts, filled ? 6 : 0);
    EXPECT_EQ(row.warm_start_bytes, filled ? 6u * 4096 * 4 : 0u);
    EXPECT_EQ(row.warm_start_seconds > 0, filled);
    EXPECT_LE(row.held_bytes_peak, row.budget_bytes);
  }
  EXPECT_EQ(cold.rows[0].warm_start, "");
  EXPECT_EQ(warm.rows[1].eviction, "lru");
  EXPECT_LT(warm.rows[1].bytes_useful, cold.rows[1].bytes_useful);
  const Json json = warm.ToJson();
  EXPECT_EQ(json["rows"][0].count("warm_start"), 0u);
  EXPECT_EQ(json["rows"][1]["warm_start"], "counted");
}

TEST_F(ComparisonTest, RowsOfAutoSayWhatEachLeadIsWorth) {
  options_.link = "native";
  SignalPredictor predictor(traces_);
  const ComparisonResult result = Compare({&predictor});
  const Json json = result.ToJson();
  bool any = false;
  int fetched = 0;
  for (const Json& row : json["rows"]) {
    const bool speculates = row["policy"] == "auto";
    EXPECT_TRUE(speculates || !row.contains("speculation")) << row["policy"];
    if (!row.contains("speculation")) continue;
    any = true;
    for (const Json& lead : row["speculation"]) {
      EXPECT_GE(lead["lead"].get<int>(), 1);
      EXPECT_GT(lead["judged"].get<int>(), 0);
      EXPECT_EQ(lead["open"].get<bool>(), lead["threshold"].get<double>() <= 1);
      const auto used = lead["used"].get<int>(), unused = lead["unused"].get<int>();
      fetched += used + unused;
      EXPECT_EQ(lead["saved_seconds"].get<double>() > 0, lead["saved"].get<double>() > 0);
      EXPECT_LE(lead["saved"].get<double>(), used);
      EXPECT_LE(lead["wasted_bytes"].get<int64_t>(), unused * 16384);  // an expert's
    }
  }
  EXPECT_TRUE(any);
  EXPECT_GT(fetched, 0);
  EXPECT_EQ(result.ToCsv().find("speculation"), std::string::npos);
}

// Slots make room as sequences grow, come back, and change no bit.
TEST_F(ComparisonTest, ResidentNeverWaitsAndUncachedNeverHits) {
  const ComparisonResult result = Compare({});
  for (const RowResult& row : result.rows) {
    if (row.policy == "resident") {
      EXPECT_EQ(row.hit_rate, 1);
      EXPECT_EQ(row.bytes_useful, 0);
    }
    if (row.eviction == "none") {
      EXPECT_EQ(row.hit_rate, 0);
    }
  }
}

TEST_F(ComparisonTest, LruMovesWhatTheSimulationSays) {
  replay_.encoder = false;
  options_.warmup_rounds = 0;
  options_.rounds = 4;
  const ComparisonResult result = Compare({});
  const std::vector<RoutingTrace> traces = SyntheticTraces(traces_, 4, 1);
  std::vector<OracleForesight::Visit> visits;
  for (const RoutingTrace& trace : traces) {
    for (int t = 0; t < 6; ++t) {
      for (int l = 0; l < 2; ++l) {
        visits.push_back(
            {2 + l, {trace.decoder.expert_ids[static_cast<size_t>(l * 6 + t)]}});
      }
    }
  }
  const MissCount expected = CountMisses(traces_.geometry, 6, Eviction::kLru, visits, 0);
  const MissCount least = CountMisses(traces_.geometry, 6, Eviction::kBelady, visits, 0);
  const int64_t blob = 2 * 32 * 64 * 4;
  for (const RowResult& row : result.rows) {
    if (row.policy != "on_demand" || row.eviction != "lru") continue;
    EXPECT_EQ(row.bytes_useful, expected.misses[1] * blob);
    EXPECT_EQ(row.bytes_belady, least.misses[1] * blob);
    EXPECT_EQ(row.bytes_late + row.bytes_wasted, 0);
  }
}

TEST_F(ComparisonTest, BatchesShareOneLoadOfAnExpert) {
  SignalPredictor predictor(traces_);
  for (const int batch : {1, 2}) {
    options_.batch = batch;
    const ComparisonResult result = Compare({&predictor});
    EXPECT_TRUE(result.lossless);
    for (const RowResult& row : result.rows) {
      EXPECT_LT(row.batch_dedup, 1);
      // A step of one token shares with nobody; an encoder's are many.
      const bool alone = row.phase == Stack::kDecoder && batch == 1;
      EXPECT_EQ(row.batch_dedup > 0, !alone) << row.policy << ", batch " << batch;
    }
  }
}

// Lossy rows are named so, beside lossless ones that are not touched by them.
TEST_F(ComparisonTest, CompressedCopiesHaveRowsOfTheirOwn) {
  replay_.encoder = false;
  options_.link = "native";
  for (const CopyKind kind :
       {CopyKind::kInt8, CopyKind::kInt4, CopyKind::kSparse, CopyKind::kInt8Tensor}) {
    copies_ = kind;
    const ComparisonResult result = Compare({});
    EXPECT_TRUE(result.lossless);
    int lossy = 0;
    for (const RowResult& row : result.rows) {
      if (row.copies == "lossless") {
        EXPECT_TRUE(row.lossless);
        continue;
      }
      ++lossy;
      EXPECT_EQ(row.copies, CopyName(kind));
      EXPECT_FALSE(row.lossless);
      EXPECT_NE(row.output_sha256, result.rows[0].output_sha256);
      EXPECT_EQ(row.compared_sequences, options_.rounds);
      EXPECT_GT(row.logit_kl, 0);
      EXPECT_LT(row.logit_kl, IsInt8(kind) ? 0.01 : 1);
    }
    EXPECT_EQ(lossy, 2);  // on-demand LRU, oracle
    EXPECT_NE(ComparisonTable(result).find(std::string("LOSSY ") + CopyName(kind)),
              std::string::npos);
  }
}

// On-demand LRU moves as many experts, each by its compressed size.
TEST_F(ComparisonTest, CompressedCopiesMoveFewerBytes) {
  replay_.encoder = false;
  options_.link = "native";
  copies_ = CopyKind::kInt8;
  const ComparisonResult result = Compare({});
  int64_t whole = 0, compressed = 0;
  for (const RowResult& row : result.rows) {
    if (row.policy != "on_demand" || row.eviction != "lru") continue;
    (row.copies == "lossless" ? whole : compressed) = row.bytes_useful;
  }
  const int64_t blob = 2 * 32 * 64 * 4, copy = 2 * 32 * 64 + 4 * (32 + 64);
  ASSERT_GT(whole, 0);
  EXPECT_EQ(whole / blob * copy, compressed);
  // So does Belady's policy; and what is on its way is in the budget.
  for (const RowResult& row : result.rows) {
    const bool lossy = row.copies != "lossless";
    if (row.policy == "resident") continue;
    EXPECT_EQ(row.bytes_belady % (lossy ? copy : blob), 0) << row.copies;
    EXPECT_LE(row.bytes_belady, lossy ? compressed : whole);
    EXPECT_LE(row.budget_bytes, options_.budget_bytes);
    EXPECT_LE(row.held_bytes_peak, row.budget_bytes);
    EXPECT_GE(row.held_bytes_peak, (lossy ? 4 * 8192u : 0u) + 16384u);
  }
}

// A slower device's memory bounds every step from below, in all rows, and no bit changes.
TEST_F(ComparisonTest, AProfilePacesStepsAndLink) {
  replay_.encoder = false;
  options_.link = "native";
  const ComparisonResult own = Compare({});
  DeviceProfile slow;
  slow.name = "slow";
  const LayerWork work = LayerWorkOf(ReplayConfig(traces_.geometry, replay_), 4);
  const double step = 2 * (work.between[1] + work.expert) + work.head;  // weights
  constexpr double kStepSeconds = 0.01;
  slow.memory_bytes_per_second = 4 * step / kStepSeconds;
  slow.link_bytes_per_second = 1e7;  // less than any disk brings, however busy it is
  options_.profile = slow;
  const ComparisonResult paced = Compare({});
  for (const RowResult& row : paced.rows) {
    EXPECT_GE(row.p50_ms, 0.99e3 * kStepSeconds) << row.policy;
    EXPECT_TRUE(row.emulated);
    EXPECT_EQ(row.output_sha256, own.rows[0].output_sha256);
  }
  EXPECT_FALSE(own.rows[0].emulated);
  EXPECT_LE(paced.link_bytes_per_second, 1e7);
  EXPECT_NE(paced.notes[0].find("emulates slow"), std::string::npos) << paced.notes[0];
}

// What the profile's memory does not hold is not resident.
TEST_F(ComparisonTest, AProfilesMemoryBoundsTheResidentRow) {
  DeviceProfile small;
  small.name = "small";
  small.memory_bytes_per_second = small.link_bytes_per_second = 1e15;
  small.memory_bytes = 10 * 4 * 4096;  // of 24 experts
  options_.profile = small;
  const ComparisonResult result = Compare({});
  for (const RowResult& row : result.rows) EXPECT_NE(row.policy, "resident");
}

TEST_F(ComparisonTest, ResultFileHasExactlyTheDocumentedKeys) {
  const Json json = Compare({}).ToJson();
  const std::vector<std::string> expected = {"policy",
                                             "predictor",
                                             "eviction",
                                             "tier",
                                             "budget_bytes",
                                             "held_bytes_peak",
                                             "budget_phase_share",
                                             "phase",
                                             "batch",
                                             "prompts",
                                             "schedule",
                                             "pairs",
                                             "tokens_per_second",
                                             "spread",
                                             "speed_up",
                                             "speed_up_spread",
                                             "effect_size",
                                             "rounds",
                                             "switched_off",
                                             "compute_ms_spread",
                                             "stall_ms_spread",
                                             "p50_ms",
                                             "p95_ms",
                                             "p99_ms",
                                             "hit_rate",
                                             "prefetch_precision",
                                             "prefetch_recall",
                                             "prefetch_timely",
                                             "batch_dedup",
                                             "bytes_useful",
                                             "bytes_late",
                                             "bytes_wasted",
                                             "bytes_belady",
                                             "stall_seconds",
                                             "compute_seconds",
                                             "transfer_seconds",
                                             "predictor_seconds",
                                             "predictor_aside_seconds",
                                             "predictor_share",
                                             "link_share",
                                             "compute_share",
                                             "bound",
                                             "lossless",
                                             "copies",
                                             "output_sha256",
                                             "synthetic_weights",
                                             "emulated"};
  std::vector<std::string> keys;
  for (const auto& [key, value] : json["rows"][0].items()) keys.push_back(key);
  EXPECT_EQ(keys, expected);
  keys.clear();
  for (const auto& [key, value] : json.items()) keys.push_back(key);
  EXPECT_EQ(keys,
            (std::vector<std::string>{"rows", "device", "link_peak_bytes_per_second"}));
}

// The columns are those of the row that has most: a lossy one.
TEST(ComparisonResultTest, CsvHasTheKeysAndValuesOfJson) {
  ComparisonResult result;
  result.rows.resize(2);
  result.rows[0].prompts = "a,\"b\".txt";
  result.rows[0].speed_up_spread = {0.5, 1, 1.25, 2, 3};
  result.rows[1].copies = "int8";
  result.rows[1].logit_kl = 0.5;
  const std::string csv = result.ToCsv();
  std::vector<std::string> lines;
  for (size_t at = 0, end; (end = csv.find("\r\n", at)) != csv.npos; at = end + 2)
    lines.push_back(csv.substr(at, end - at));
  ASSERT_EQ(lines.size(), 3u);
  EXPECT_TRUE(lines[0].starts_with("policy,predictor,eviction,tier,budget_bytes,"));
  EXPECT_NE(
      lines[0].find(",speed_up_spread_min,speed_up_spread_q1,speed_up_spread_median,"
                    "speed_up_spread_q3,speed_up_spread_max,"),
      lines[0].npos);
  EXPECT_NE(lines[0].find(",logit_kl,"), lines[0].npos);
  EXPECT_NE(lines[1].find(",\"a,\"\"b\"\".txt\","), lines[1].npos);
  EXPECT_NE(lines[1].find(",0.5,1.0,1.25,2.0,3.0,"), lines[1].npos);
  EXPECT_TRUE(lines[1].ends_with(",,,,"))
      << "what the lossless row has not: " << lines[1];
  EXPECT_NE(lines[2].find(",1.0,0.5,0.0,0"), lines[2].npos) << lines[2];
}

}  // namespace
}  // namespace routecast
