#include "storage/verify.h"

#include <algorithm>
#include <cmath>
#include <fstream>

#include "common/errors.h"
#include "storage/shard_db.h"
#include "storage/statistics.h"
#include "storage/statistics_routing.h"
#include "tests/storage/store_fixture.h"

namespace routecast {
namespace {

std::vector<fs::path> TableFiles(const fs::path& store) {
  std::vector<fs::path> files;
  for (const auto& entry : fs::recursive_directory_iterator(store / "shards")) {
    if (entry.path().extension() == ".sst") files.push_back(entry.path());
  }
  return files;
}

TEST_F(TraceStoreTest, ASoundStoreIsSound) {
  Fill();
  const VerifyReport report = VerifyStore(store());
  EXPECT_TRUE(report.sound()) << report.problems[0];
  EXPECT_EQ(report.chunks, kChunks);
  EXPECT_EQ(report.sequences, kChunks * kPerChunk);
}

TEST_F(TraceStoreTest, FlippedBytesOfTablesAreFound) {
  Fill();
  for (const fs::path& file : TableFiles(store())) {
    const std::string good = ReadFile(file);
    // Data, index, properties and footer: places spread over the whole file.
    for (int place = 0; place < 4; ++place) {
      const size_t at = good.size() * place / 4 + 11;
      std::string bad = good;
      bad[at] = static_cast<char>(bad[at] ^ 0x20);
      std::ofstream(file, std::ios::binary) << bad;
      EXPECT_FALSE(VerifyStore(store()).sound()) << file << " at " << at;
    }
    std::ofstream(file, std::ios::binary) << good;
  }
  EXPECT_TRUE(VerifyStore(store()).sound());
}

TEST_F(TraceStoreTest, CutTablesAreFound) {
  Fill();
  const fs::path file = TableFiles(store()).at(0);
  const std::string good = ReadFile(file);
  for (const size_t size : {size_t{0}, good.size() / 2, good.size() - 1}) {
    std::ofstream(file, std::ios::binary) << good.substr(0, size);
    EXPECT_FALSE(VerifyStore(store()).sound()) << size;
  }
}

TEST_F(TraceStoreTest, AMissingShardIsFound) {
  Fill();
  fs::remove_all(store() / "shards" / "00002");
  EXPECT_FALSE(VerifyStore(store()).sound());
  EXPECT_THROW(TraceReader{store()}, DataError);
}

// One of each problem names `what`.
void ExpectProblem(const VerifyReport& report, const std::string& what) {
  const auto names = [&](const std::string& problem) {
    return problem.find(what) != problem.npos;
  };
  EXPECT_TRUE(std::any_of(report.problems.begin(), report.problems.end(), names))
      << what << " is not in " << (report.sound() ? "" : report.problems[0]);
}

// Their checksums hold.
TEST_F(TraceStoreTest, RecordsThatDoNotFitTheGeometryAreNamed) {
  Fill();
  Json json = config_.ToJson();
  json["geometry"]["num_experts"] = 64;
  WriteFileAtomic(store() / "store.json", json.dump());
  const VerifyReport report = VerifyStore(store());
  EXPECT_EQ(report.sequences, 0u);
  const uint64_t id = All().begin()->first;
  ExpectProblem(report, ": sequence " + std::to_string(id) + " (");
  ExpectProblem(report, "128 experts; the store says");
}

TEST_F(TraceStoreTest, ARecordThatIsGoneIsNamed) {
  Fill();
  const RoutingTrace trace = All().begin()->second;
  const std::string key = EncodeKey(KindOf(Stack::kEncoder), trace.sequence_id);
  for (int shard = 0; shard < config_.num_shards; ++shard) {
    const ShardDb db(store(), shard, config_, ShardDb::Mode::kWrite);
    CheckStatus(db.db()->Delete(rocksdb::WriteOptions(), key), "delete", db.path());
  }
  const VerifyReport report = VerifyStore(store());
  EXPECT_EQ(report.sequences, kChunks * kPerChunk - 1);
  ExpectProblem(report, ": sequence " + std::to_string(trace.sequence_id) + " (encoder)");
}

// Of a sequence that no chunk has.
TEST_F(TraceStoreTest, ARecordTooManyIsFound) {
  Fill();
  const RoutingTrace trace = All().begin()->second;
  const std::string key = EncodeKey(KindOf(Stack::kEncoder), 1 << 20);
  {
    const ShardDb db(store(), 0, config_, ShardDb::Mode::kWrite);
    const std::string value =
        EncodeSpan(key, trace.encoder, trace.task, config_.geometry.num_experts);
    CheckStatus(db.db()->Put(rocksdb::WriteOptions(), key, value), "put", db.path());
  }
  ExpectProblem(VerifyStore(store()), "records, the chunk marks name ");
}

TEST_F(TraceStoreTest, StatisticsAgreeWithANaiveCount) {
  Fill();
  const StoreStatistics stats = ComputeStatistics(TraceReader(store()));
  ASSERT_EQ(stats.layers.size(), 6u);
  const int layer = 4;  // decoder layer 1
  std::map<int, double> count, previous;
  std::map<std::pair<int, int>, double> joint;
  double n = 0, dropped = 0;
  std::vector<float> probs;
  for (const auto& [id, trace] : All()) {
    const RoutingSpan& s = trace.decoder;
    for (int t = 0; t < s.num_tokens; ++t) {
      const int x = s.expert_ids[s.num_tokens + t], y = s.expert_ids[t];
      ++count[x], ++previous[y], ++joint[{y, x}], ++n;
      dropped += s.dropped[s.num_tokens + t];
      probs.push_back(s.gate_probs[s.num_tokens + t]);
    }
  }
  double entropy = 0, conditional = 0;
  for (const auto& [x, c] : count) entropy -= c / n * std::log2(c / n);
  for (const auto& [yx, c] : joint)
    conditional -= c / n * std::log2(c / previous[yx.first]);
  const LayerStatistics& s = stats.layers[layer];
  EXPECT_EQ(s.stack, Stack::kDecoder);
  EXPECT_EQ(s.layer, 1);
  EXPECT_NEAR(s.entropy_bits, entropy, 1e-9);
  EXPECT_NEAR(s.conditional_entropy_bits, conditional, 1e-9);
  EXPECT_NEAR(s.dropped, dropped / n, 1e-12);
  for (int e = 0; e < shape_.num_experts; ++e) EXPECT_EQ(s.counts[e], count[e]);
  std::sort(probs.begin(), probs.end());
  EXPECT_EQ(s.gate_probs[3], probs[(probs.size() - 1) / 2]);
  EXPECT_EQ(stats.layers[3].conditional_entropy_bits, -1);
}

TEST_F(TraceStoreTest, StatisticsAreWritten) {
  Fill();
  const fs::path out = folder_.path() / "stats";
  WriteStatistics(ComputeStatistics(TraceReader(store())), out);
  const Json json = ReadJsonFile(out / "stats.json");
  EXPECT_EQ(json["layers"][0]["phase"], "encoder");
  EXPECT_TRUE(json["layers"][0]["conditional_entropy_bits"].is_null());
  EXPECT_EQ(ReadFile(out / "load.csv").substr(0, 25), "layer_id,expert_id,count\n");
}

TEST_F(TraceStoreTest, StatisticsTellHowFarTheyAre) {
  Fill();
  const TraceReader reader(store());
  const uint64_t all = reader.sequences().size();
  uint64_t told = 0, last = 0;
  const auto tell = [&](uint64_t done) { ++told, last = done; };
  ComputeStatistics(reader, tell);
  EXPECT_EQ(told, all);
  EXPECT_EQ(last, all);
  ComputeRoutingStatistics(reader, tell);
  EXPECT_EQ(told, 2 * all);
  EXPECT_EQ(last, all);
}

}  // namespace
}  // namespace routecast
