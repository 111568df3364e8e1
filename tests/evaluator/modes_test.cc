// What routecast-evaluate does beside generating: quality, simulation, transfers, status,
// timelines.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>

#include "common/errors.h"
#include "evaluator/comparison.h"
#include "evaluator/disk_sweep.h"
#include "evaluator/policy_simulation.h"
#include "evaluator/predictor_set.h"
#include "evaluator/quality.h"
#include "evaluator/status.h"
#include "evaluator/timeline.h"
#include "tests/evaluator/fake_device.h"
#include "tests/evaluator/synthetic_store.h"
#include "tests/models/switch_test_support.h"

namespace routecast {
namespace {

using testing::HasSubstr;

class ModesTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = fs::temp_directory_path() / ("modes_test." + std::to_string(::getpid()));
    WriteSyntheticStore(folder_ / "store", SmallConfig());
    reader_ = std::make_unique<TraceReader>(folder_ / "store");
  }
  static void TearDownTestSuite() {
    reader_.reset();
    fs::remove_all(folder_);
  }
  static std::vector<std::unique_ptr<ExpertPredictor>> Predictors(
      const std::vector<std::string>& names) {
    return MakePredictors(names, names, reader_->config().geometry, {}, reader_.get(),
                          true);
  }
  static inline fs::path folder_;
  static inline std::unique_ptr<TraceReader> reader_;
};

// Against whole windows, token by token.
TEST_F(ModesTest, QualityIsWhatThePredictorSays) {
  const auto predictors = Predictors({"markov", "frequency"});
  QualityOptions options;
  options.quiet = true;
  const auto all = MeasureQuality(*reader_, predictors, options);
  ASSERT_EQ(all.size(), 2u);
  const MoeGeometry g = reader_->config().geometry;
  for (size_t p = 0; p < 2; ++p) {
    int places = 0;
    for (const QualityScores& place : all[p].places) {
      const LeadScores& s = place.scores;
      double right = 0, count = 0;
      for (const SequenceInfo& info : reader_->sequences()) {
        if (SplitOf(info.group_id) != SplitPart::kTest) continue;
        const RoutingTrace trace = reader_->Read(info.sequence_id, WithHidden::kNo);
        const auto labels = WindowLabels(trace, s.phase, s.layer, s.lead);
        const auto probs = predictors[p]->Predict(
            WindowOf(trace, s.phase, s.layer, g.num_experts), s.lead);
        const auto guess = (*probs)[0].argmax(1);
        for (int64_t t = 0; t < labels.size(0); ++t) {
          if (labels[t].item<int64_t>() < 0) continue;
          right += guess[t].item<int64_t>() == labels[t].item<int64_t>();
          ++count;
        }
      }
      EXPECT_EQ(s.samples, count);
      EXPECT_GE(place.ece_equal_mass, 0);
      EXPECT_LE(place.ece_equal_mass, 1);
      EXPECT_LE(place.confidence_variation, place.variation + 1e-9);
      EXPECT_NEAR(s.top[0], right / count, 1e-9)
          << all[p].predictor << StackName(s.phase) << s.layer << s.lead;
      ++places;
    }
    EXPECT_GT(places, 4);
    EXPECT_GT(all[p].questions, 0);
    EXPECT_LE(all[p].p50_us, all[p].p95_us);
  }
  // The same answer for every token: nothing moves, nothing correlates.
  for (const QualityScores& place : all[1].places) {
    EXPECT_NEAR(place.variation, 0, 1e-6);
    EXPECT_NEAR(place.confidence_variation, 0, 1e-6);
    EXPECT_TRUE(std::isnan(place.confidence_correlation));
  }
  EXPECT_THAT(QualityTable(all), HasSubstr("markov"));
}

// What counts while it serves is asked in the order of the pass, or it would learn
// nothing here.
TEST_F(ModesTest, QualityLetsStrategiesLearnOnTheWay) {
  const auto predictors = Predictors({"recent_frequency", "token_patterns"});
  QualityOptions options;
  options.quiet = true;
  for (const PredictorQuality& quality : MeasureQuality(*reader_, predictors, options)) {
    ASSERT_FALSE(quality.places.empty()) << quality.predictor;
    double nats = 0;
    for (const QualityScores& place : quality.places) {
      EXPECT_EQ(place.scores.phase, Stack::kDecoder) << quality.predictor;
      nats += place.scores.cross_entropy / static_cast<double>(quality.places.size());
    }
    EXPECT_LT(nats, 27) << quality.predictor;  // 27.6 where nothing is ever said
  }
}

TEST_F(ModesTest, AShiftAsksTheSecondStoreWithWhatTheFirstTaught) {
  QualityOptions options;
  options.quiet = true;
  const std::vector<std::string> names = {"markov", "recent_frequency"};
  const ShiftedQuality shifted =
      MeasureShift(*reader_, *reader_, Predictors(names), options);
  const auto alone = MeasureQuality(*reader_, Predictors(names), options);
  const auto nats = [](const PredictorQuality& quality) {
    double sum = 0;
    for (const QualityScores& place : quality.places) sum += place.scores.cross_entropy;
    return sum;
  };
  ASSERT_EQ(shifted.before.size(), 2u);
  ASSERT_EQ(shifted.after.size(), 2u);
  EXPECT_EQ(nats(shifted.before[0]), nats(alone[0]));
  EXPECT_EQ(nats(shifted.after[0]), nats(alone[0])) << "counts of a store learn nothing";
  EXPECT_EQ(nats(shifted.before[1]), nats(alone[1]));
  EXPECT_LT(nats(shifted.after[1]), nats(alone[1])) << "what was counted before is kept";
}

TEST_F(ModesTest, AShiftToAnotherGeometryIsRefused) {
  SwitchConfig other = SmallConfig();
  other.num_experts *= 2;
  WriteSyntheticStore(folder_ / "other", other);
  const TraceReader reader(folder_ / "other");
  EXPECT_THROW(MeasureShift(*reader_, reader, Predictors({"markov"}), {}), UsageError);
}

DeviceProfile SomeProfile(double link) {
  DeviceProfile profile;
  profile.name = "test";
  profile.link_bytes_per_second = link;
  profile.memory_bytes_per_second = 10e9;
  return profile;
}

// The decoder alone, and behind the encoder.
TEST_F(ModesTest, SimulatedLruHitsAreThoseOfTheCache) {
  for (const bool encoder : {false, true}) {
    PolicySimulationOptions options;
    options.warmup_sequences = 2;
    options.encoder = encoder;
    const auto result =
        SimulatePolicies(*reader_, Predictors({"markov"}), SomeProfile(2e9), options);
    const MoeGeometry g = reader_->config().geometry;
    const int layers = g.decoder_layers + (encoder ? g.encoder_layers : 0);
    EXPECT_EQ(result.slots, layers * g.num_experts / 4);
    std::vector<SimulatedVisit> visits;
    size_t counted = 0, sequences = 0;
    for (const SequenceInfo& info : reader_->sequences()) {
      if (SplitOf(info.group_id) != SplitPart::kTest) continue;
      if (sequences++ == 2) counted = visits.size();
      const RoutingTrace trace = reader_->Read(info.sequence_id, WithHidden::kNo);
      if (encoder) AppendEncoderVisits(trace, g, 128, {}, nullptr, &visits);
      AppendVisits(trace, g, 16, {}, nullptr, &visits);
    }
    std::vector<OracleForesight::Visit> plain;
    for (const SimulatedVisit& v : visits) plain.push_back({v.layer, v.experts});
    const MissCount misses = CountMisses(g, result.slots, Eviction::kLru, plain, counted);
    double uses = 0;
    for (size_t i = counted; i < visits.size(); ++i)
      uses += static_cast<double>(visits[i].experts.size());
    const auto missed = static_cast<double>(misses.misses[0] + misses.misses[1]);
    EXPECT_NEAR(result.rows[0].hit_rate, 1 - missed / uses, 1e-9);
    EXPECT_EQ(result.rows[0].eviction, "lru");
  }
}

TEST_F(ModesTest, ASimulatedBudgetOfOneExpertIsRefused) {
  PolicySimulationOptions options;
  options.budget_share = 0.001;
  try {
    SimulatePolicies(*reader_, {}, SomeProfile(2e9), options);
    FAIL() << "was raised to two";
  } catch (const UsageError& e) {
    EXPECT_THAT(e.what(), HasSubstr("smaller than one step needs"));
    const MoeGeometry g = reader_->config().geometry;
    const int least = 200 / (g.decoder_layers * g.num_experts) + 1;
    EXPECT_THAT(e.what(), HasSubstr("=" + std::to_string(least) + "%"));
    options.budget_share = least / 100.;
    EXPECT_GE(SimulatePolicies(*reader_, {}, SomeProfile(2e9), options).slots, 2);
  }
}

// What is least, beside the policies: its misses are those that every row is held
// against.
TEST_F(ModesTest, BeladyHasARowOnDemandInASimulation) {
  PolicySimulationOptions options;
  options.warmup_sequences = 0;
  options.evictions = {"lru", "belady"};
  options.policies = {"on_demand", "auto"};  // nobody is asked on demand: no row
  const auto result =
      SimulatePolicies(*reader_, Predictors({"markov"}), SomeProfile(2e9), options);
  ASSERT_EQ(result.rows.size(), 2u + 1 + 1);  // on demand twice, markov, the oracle
  EXPECT_EQ(result.rows[1].eviction, "belady");
  EXPECT_EQ(result.rows[1].question_seconds, 0);
  EXPECT_GT(result.rows[2].question_seconds, 0);
  const MoeGeometry g = reader_->config().geometry;
  std::vector<SimulatedVisit> visits;
  for (const SequenceInfo& info : reader_->sequences()) {
    if (SplitOf(info.group_id) != SplitPart::kTest) continue;
    AppendVisits(reader_->Read(info.sequence_id, WithHidden::kNo), g, 16, {}, nullptr,
                 &visits);
  }
  std::vector<OracleForesight::Visit> plain;
  double uses = 0;
  for (const SimulatedVisit& v : visits) {
    plain.push_back({v.layer, v.experts});
    uses += static_cast<double>(v.experts.size());
  }
  const MissCount misses = CountMisses(g, result.slots, Eviction::kBelady, plain, 0);
  EXPECT_NEAR(result.rows[1].hit_rate, 1 - static_cast<double>(misses.misses[1]) / uses,
              1e-9);
  EXPECT_GT(result.rows[1].hit_rate, result.rows[0].hit_rate);
}

TEST_F(ModesTest, ASimulationMayBeginWarmAndSaysWhatThatTakes) {
  PolicySimulationOptions options;
  options.warmup_sequences = 0;
  options.sequences = 1;
  const auto simulate = [&] {
    return SimulatePolicies(*reader_, Predictors({"markov"}), SomeProfile(2e9), options);
  };
  const auto cold = simulate();
  EXPECT_EQ(cold.ToJson().count("warm_start"), 0u);
  // What the sequence's first token chooses.
  const MoeGeometry g = reader_->config().geometry;
  std::vector<uint64_t> counts(static_cast<size_t>(g.num_keys()), 0);
  for (const SequenceInfo& info : reader_->sequences()) {
    if (SplitOf(info.group_id) != SplitPart::kTest) continue;
    const RoutingSpan span = reader_->Read(info.sequence_id, WithHidden::kNo).decoder;
    for (int l = 0; l < g.decoder_layers; ++l) {
      const ExpertKey key{g.GlobalLayer(Stack::kDecoder, l),
                          span.expert_ids[static_cast<size_t>(l * span.num_tokens)]};
      counts[static_cast<size_t>(key.Index(g))] = 1;
    }
    break;
  }
  options.warm_start = std::make_shared<UseShares>(SharesOf(counts, g, "first token"));
  const auto warm = simulate();
  EXPECT_LT(warm.rows[0].stall_seconds, cold.rows[0].stall_seconds);
  const double transfer = 8.0 * options.d_model * options.d_ff / 2e9;
  EXPECT_NEAR(warm.ToJson()["warm_start_seconds"].get<double>(), warm.slots * transfer,
              1e-9);
}

TEST_F(ModesTest, ASimulatedPhaseAwareCacheKnowsTheEncoder) {
  PolicySimulationOptions options;
  options.evictions = {"lru", "phase_aware"};
  const auto stalls = [&](bool encoder) {
    options.encoder = encoder;
    const auto rows =
        SimulatePolicies(*reader_, Predictors({"markov"}), SomeProfile(2e9), options)
            .rows;
    return std::pair(rows[0].stall_seconds, rows[1].stall_seconds);
  };
  const auto alone = stalls(false), behind = stalls(true);
  EXPECT_EQ(alone.first, alone.second) << "one stack: least recently used";
  EXPECT_NE(behind.first, behind.second);
}

TEST_F(ModesTest, SimulationIsDeterministicAndTheOracleIsBest) {
  PolicySimulationOptions options;
  options.policies = {"auto", "top_k"};
  options.evictions = {"lru", "lfu"};
  const auto simulate = [&] {
    Json json = SimulatePolicies(*reader_, Predictors({"markov", "token_table"}),
                                 SomeProfile(2e9), options)
                    .ToJson();
    return json["rows"];
  };
  const Json rows = simulate();
  EXPECT_EQ(rows, simulate());
  // LRU and LFU on demand, two predictors x two policies x two evictions, the oracle.
  ASSERT_EQ(rows.size(), 2u + 8 + 1);
  const Json oracle = rows.back();
  EXPECT_EQ(oracle["predictor"], "oracle");
  for (const Json& row : rows) {
    EXPECT_LE(row["speed_up"].get<double>(), oracle["speed_up"].get<double>() + 1e-9);
    EXPECT_LE(row["speed_up"].get<double>(), row["bound"].get<double>() + 1e-9);
    EXPECT_TRUE(row["simulated"].get<bool>());
  }
}

TEST_F(ModesTest, AFreeLinkLeavesNothingToWin) {
  PolicySimulationOptions options;
  options.question_seconds = 0;
  const auto result =
      SimulatePolicies(*reader_, Predictors({"markov"}), SomeProfile(1e17), options);
  for (const SimulatedRow& row : result.rows) {
    EXPECT_NEAR(row.speed_up, 1, 1e-6);
    EXPECT_NEAR(row.bound, 1, 1e-6);
  }
}

TEST(DeviceProfileTest, ALineThroughTransfersGivesRateAndFixedCost) {
  std::vector<TransferPoint> points;
  for (const uint64_t bytes :
       {uint64_t{64} << 10, uint64_t{1} << 20, uint64_t{64} << 20}) {
    TransferPoint p;
    p.bytes = bytes;
    p.seconds = 50e-6 + static_cast<double>(bytes) / 3e9;
    points.push_back(p);
  }
  double fixed = 0, rate = 0;
  FitLink(points, &fixed, &rate);
  EXPECT_NEAR(fixed, 50e-6, 1e-9);
  EXPECT_NEAR(rate, 3e9, 1e3);
}

TEST(DeviceProfileTest, TheDiskIsMeasuredAndTheScratchFileGoes) {
  DiskSweepOptions options;
  options.folder = fs::path(testing::TempDir()) / "transfer_test";
  options.file_bytes = options.largest = 4 << 20;
  options.seconds_a_point = 0.005;
  options.quiet = true;
  const DeviceProfile profile = MeasureDisk(options);
  EXPECT_GT(profile.link_bytes_per_second, 1e6);
  EXPECT_GT(profile.memory_bytes_per_second, 1e8);
  EXPECT_GE(profile.sweep.size(), 3u * 4 + 1);
  EXPECT_TRUE(std::any_of(profile.sweep.begin(), profile.sweep.end(),
                          [](const TransferPoint& p) { return p.both_ways; }));
  EXPECT_TRUE(fs::is_empty(options.folder));
  const DeviceProfile read = DeviceProfile::FromJson(profile.ToJson(), "test");
  EXPECT_DOUBLE_EQ(read.link_bytes_per_second, profile.link_bytes_per_second);
  EXPECT_FALSE(read.emulated);
}

// The page cache is eight times as fast as the disk, and says nothing about it.
TEST(DeviceProfileTest, TheLinkOfADiskIsWhatDirectReadsGet) {
  DeviceProfile profile;
  for (const bool direct : {true, false}) {
    for (const int threads : {1, 2}) {
      for (const uint64_t bytes : {uint64_t{1} << 20, uint64_t{16} << 20}) {
        TransferPoint p{bytes, threads, direct};
        p.seconds =
            1e-4 + static_cast<double>(bytes) / (1e9 * threads * (direct ? 1 : 8));
        profile.sweep.push_back(p);
      }
    }
  }
  ConcludeDisk(&profile);
  EXPECT_NEAR(profile.link_bytes_per_second, 2e9, 1e3);
  EXPECT_EQ(profile.bytes_at_90_percent, uint64_t{16} << 20);
  std::erase_if(profile.sweep, [](const TransferPoint& p) { return p.direct; });
  ConcludeDisk(&profile);  // a file system without direct reads
  EXPECT_NEAR(profile.link_bytes_per_second, 16e9, 1e4);
}

TEST(DeviceProfileTest, WhatIsNoProfileIsRefused) {
  EXPECT_THROW(FindProfile("rtx4090"), UsageError);
  EXPECT_TRUE(FindProfile("rtx3090").emulated);
  for (const char* text : {"[]", "{}", R"({"link_bytes_per_second": 0})",
                           R"({"link_bytes_per_second": "x", "link_fixed_seconds": 0,
            "memory_bytes_per_second": 1})",
                           R"({"link_bytes_per_second": -1, "link_fixed_seconds": 0,
            "memory_bytes_per_second": 1})"}) {
    EXPECT_THROW(DeviceProfile::FromJson(Json::parse(text), "test"), DataError) << text;
  }
}

TEST_F(ModesTest, StatusNamesWhatThereIs) {
  const fs::path in = folder_ / "status";
  fs::create_directories(in / "model");
  WriteFileAtomic(
      in / "model/config.json",
      R"({"model_type": "switch_transformers", "num_experts": 8, "d_model": 6})");
  fs::create_directories(in / "run");
  WriteFileAtomic(in / "run/run.json",
                  R"({"program": "routecast-train", "exit_status": 75})");
  fs::create_directories(in / "other/half.tmp");
  WriteFileAtomic(in / "other/half.tmp/part", "12345");
  fs::create_directories(in / "junk");
  WriteFileAtomic(in / "junk/config.json", "{ not json");
  WriteFileAtomic(in / "junk/run.json", "[1, 2]");
  fs::copy(folder_ / "store", in / "store", fs::copy_options::recursive);
  WriteFileAtomic(in / "store/run.json", R"({"program": "routecast-collect",
      "exit_status": 75, "results": {"chunks": 3, "num_chunks": 8}})");
  std::map<std::string, Artefact> found;
  for (const Artefact& a : FindArtefacts(in)) {
    found[fs::relative(a.path, in).string()] = a;
  }
  ASSERT_EQ(found.size(), 4u);
  EXPECT_EQ(found["model"].kind, "model");
  EXPECT_THAT(found["run"].detail, HasSubstr("stopped: the same command goes on"));
  EXPECT_EQ(found["store"].kind, "store");
  EXPECT_THAT(found["store"].detail,
              HasSubstr(", 3 of 8 chunks; routecast-collect, sto"));
  EXPECT_GT(found["store"].bytes, 1000u);
  EXPECT_EQ(found["other/half.tmp"].kind, "partial");
  EXPECT_EQ(found["other/half.tmp"].bytes, 5u);
  EXPECT_THROW(FindArtefacts(in / "nothing"), UsageError);
  const Json machine = MachineStatus();
  EXPECT_GE(machine["cores"].get<int>(), 1);
  EXPECT_THAT(StatusText(machine, FindArtefacts(in)), HasSubstr("half.tmp"));
}

TEST(StatusTest, NamesEachDeviceAndWhatItHasFree) {
  const auto log = std::make_shared<FakeDeviceLog>();
  Json machine = MachineStatus();
  EXPECT_EQ(machine["devices"].size(), machine["cuda_devices"].get<size_t>());
  machine["devices"] = DeviceStatus(2, [&](int index) -> std::unique_ptr<DeviceCopy> {
    if (index == 1) throw EnvironmentError("it fell off the bus");
    return std::make_unique<FakeDevice>(log, 20e9);
  });
  const std::string text = StatusText(machine, {});
  EXPECT_THAT(text, HasSubstr("device: fake device, "));
  EXPECT_THAT(text, HasSubstr(" free\ndevice: it fell off the bus\n"));
}

// A build with CUDA on a machine without a card has CUDA all the same.
TEST(StatusTest, TellsABuildWithoutCudaFromAMachineWithoutACard) {
  bool has_body = true;
  try {
    OpenCudaDevice(1000);
  } catch (const EnvironmentError& e) {
    has_body = std::string(e.what()).find("this build has no CUDA") == std::string::npos;
  }
  const Json machine = MachineStatus();
  EXPECT_EQ(machine["cuda_built"].get<bool>(), has_body);
  if (machine["cuda_devices"].get<int>() > 0) return;
  EXPECT_THAT(machine["missing"].dump(), HasSubstr(has_body ? "--device=cuda is refused ("
                                                            : "serves the CPU alone"));
}

TEST(TimelineTest, SpansOfALaneNeverOverlap) {
  Timeline timeline;
  timeline.BeginProcess("row");
  timeline.Span(Timeline::Track::kLink, "a", 10, 13, {{"for", "demand"}});
  timeline.Span(Timeline::Track::kLink, "b", 11, 12);
  timeline.Span(Timeline::Track::kLink, "c", 12.5, 14);
  timeline.Span(Timeline::Track::kModel, "d", 11, 12);
  timeline.Mark(Timeline::Track::kCache, "evict", 12);
  const Json json = Json::parse(timeline.ToJson());
  std::map<std::string, Json> events;
  std::map<int, std::vector<std::pair<double, double>>> lanes;
  for (const Json& e : json["traceEvents"]) {
    if (e["ph"] == "M") continue;
    events[e["name"]] = e;
    if (e["ph"] != "X") continue;
    const double ts = e["ts"], dur = e["dur"];
    for (const auto& [begin, end] : lanes[e["tid"]])
      EXPECT_TRUE(ts >= end || ts + dur <= begin);
    lanes[e["tid"]].emplace_back(ts, ts + dur);
  }
  EXPECT_EQ(lanes.size(), 3u);  // two of the link, one of the model
  EXPECT_DOUBLE_EQ(events["a"]["ts"].get<double>(), 0);  // from the first event on
  EXPECT_DOUBLE_EQ(events["b"]["ts"].get<double>(), 1e6);
  EXPECT_EQ(events["a"]["args"]["for"], "demand");
  EXPECT_EQ(events["evict"]["ph"], "i");
  EXPECT_NE(events["a"]["tid"], events["b"]["tid"]);
  EXPECT_EQ(events["b"]["tid"], events["c"]["tid"]);
}

TEST(TimelineTest, KeepsABoundedNumberOfEventsAndSaysSo) {
  Timeline timeline;
  timeline.BeginProcess("row");
  for (size_t i = 0; i < Timeline::kMostEvents + 5; ++i) {
    timeline.Mark(Timeline::Track::kCache, "x", static_cast<double>(i));
  }
  EXPECT_EQ(timeline.num_events(), Timeline::kMostEvents);
  EXPECT_EQ(timeline.num_dropped(), 5u);
}

}  // namespace
}  // namespace routecast
