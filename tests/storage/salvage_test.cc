#include "storage/salvage.h"

#include <fstream>
#include <set>

#include "common/errors.h"
#include "storage/verify.h"
#include "tests/common/hostile_files.h"
#include "tests/storage/store_fixture.h"

namespace routecast {
namespace {

constexpr uint64_t kMiB = uint64_t{1} << 20;

void Damage(const fs::path& file, size_t at) {
  std::string bytes = ReadFile(file);
  bytes.at(at) = static_cast<char>(bytes.at(at) ^ 1);
  std::ofstream(file, std::ios::binary) << bytes;
}

class SalvageTest : public TraceStoreTest {
 protected:
  // Few router inputs: the largest table of a shard is its routing.
  SalvageTest() { shape_.hidden_share = config_.hidden_share = 0.2; }
  void FillAndSeal() {
    Fill();
    ShardOwner(store(), config_, 0, 1).Finish();
  }
  fs::path TableOf(int shard) const {
    fs::path largest;
    for (const auto& entry : fs::directory_iterator(ShardFolder(shard))) {
      if (entry.path().extension() != ".sst") continue;
      if (largest.empty() || entry.file_size() > fs::file_size(largest)) {
        largest = entry.path();
      }
    }
    return largest;
  }
  fs::path ShardFolder(int shard) const {
    return store() / "shards" / ("0000" + std::to_string(shard));
  }
  // Puts nothing, for much longer than a window, before and behind the largest table.
  fs::path MakeLong(int shard) const {
    const fs::path table = TableOf(shard);
    const std::string bytes = ReadFile(table);
    fs::resize_file(table, 0);
    fs::resize_file(table, 24 * kMiB);
    std::ofstream(table, std::ios::binary | std::ios::app) << bytes;
    fs::resize_file(table, 32 * kMiB);
    return table;
  }
  // All sequences, searched for through a window of so many bytes.
  void ExpectAllThrough(size_t window_bytes) {
    const Salvage salvage(store(), window_bytes);
    const auto all = All();
    ASSERT_EQ(salvage.sequences().size(), all.size());
    for (const SequenceInfo& info : salvage.sequences()) {
      const auto trace = salvage.Read(info);
      ASSERT_TRUE(trace) << info.sequence_id;
      EXPECT_EQ(*trace, all.at(info.sequence_id));
    }
  }
  SalvageReport SalvageIt() { return SalvageStore(store(), folder_.path() / "saved"); }
};

TEST_F(SalvageTest, ASoundStoreIsKeptWhole) {
  FillAndSeal();
  EXPECT_EQ(SalvageIt().sequences, kChunks * kPerChunk);
  const auto all = All();
  auto expected = all.begin();
  TraceReader(folder_.path() / "saved")
      .Scan([&](RoutingTrace&& t) { EXPECT_EQ(t, expected++->second); },
            WithHidden::kYes);
  EXPECT_EQ(expected, all.end());
}

TEST_F(SalvageTest, ALostManifestCostsNothing) {
  FillAndSeal();
  fs::remove(ShardFolder(1) / "CURRENT");
  EXPECT_FALSE(VerifyStore(store()).sound());
  const SalvageReport report = SalvageIt();
  EXPECT_EQ(report.sequences, kChunks * kPerChunk);
  EXPECT_EQ(report.lost + static_cast<uint64_t>(report.lost_chunks), 0u);
}

TEST_F(SalvageTest, ALostFooterCostsNothing) {
  FillAndSeal();
  const fs::path table = TableOf(2);
  fs::resize_file(table, fs::file_size(table) - 60);
  EXPECT_THROW(TraceReader{store()}, DataError);
  EXPECT_EQ(SalvageIt().sequences, kChunks * kPerChunk);
}

TEST_F(SalvageTest, AMissingTableCostsItsSequencesAndNamesThem) {
  FillAndSeal();
  // The larger table of a shard is the routing of all its chunks.
  fs::remove(TableOf(3));
  const SalvageReport report = SalvageIt();
  const auto of_shard = kChunks / 4 * kPerChunk;
  EXPECT_EQ(report.lost, of_shard);
  EXPECT_EQ(report.lost_ids.size(), of_shard);
  EXPECT_EQ(report.sequences, kChunks * kPerChunk - of_shard);
}

TEST_F(SalvageTest, AMissingShardCostsItsSequencesAndNamesThem) {
  FillAndSeal();
  fs::remove_all(ShardFolder(0));
  fs::remove(store() / "store.json");  // the seals have it
  const SalvageReport report = SalvageIt();
  const auto of_others = report.sequences;
  EXPECT_GT(of_others, 0u);
  EXPECT_EQ(report.lost, kChunks * kPerChunk - of_others);
  EXPECT_EQ(report.lost_ids.size(), report.lost);
  EXPECT_EQ(report.lost_chunks, 0);
}

TEST_F(SalvageTest, ADamagedSealCostsNothing) {
  FillAndSeal();
  Damage(store() / "shards" / "00000.seal", 100);
  const VerifyReport report = VerifyStore(store());
  EXPECT_EQ(report.num_problems, 1u);
  EXPECT_EQ(report.sequences, kChunks * kPerChunk);
  EXPECT_EQ(SalvageIt().sequences, kChunks * kPerChunk);
}

TEST_F(SalvageTest, ASchemaChangedByAFlipIsDamageNotAnotherVersion) {
  FillAndSeal();
  std::string text = ReadFile(store() / "store.json");
  text.replace(text.find("\"schema\": 1") + 10, 1, "3");
  std::ofstream(store() / "store.json") << text;
  const VerifyReport report = VerifyStore(store());
  ASSERT_FALSE(report.sound());
  EXPECT_NE(report.problems[0].find("store.json is not as it was sealed"),
            std::string::npos);
  EXPECT_EQ(SalvageIt().sequences, kChunks * kPerChunk);
}

TEST_F(SalvageTest, AStoreWithoutSealsIsSalvagedToo) {
  Fill();
  fs::remove(ShardFolder(1) / "CURRENT");
  EXPECT_EQ(SalvageIt().sequences, kChunks * kPerChunk);
}

// Records, and compressed blocks, of several times the window.
TEST_F(SalvageTest, RecordsLongerThanTheWindowAreFound) {
  for (const char* compression : {"none", "zstd"}) {
    SCOPED_TRACE(compression);
    fs::remove_all(store());
    config_.compression = compression;
    FillAndSeal();
    for (const size_t window_bytes : {64, 100, 1000, 4096}) {
      ExpectAllThrough(window_bytes);
    }
  }
}

TEST_F(SalvageTest, TablesLongerThanTheWindowAreSalvagedEquallyInItsMemory) {
  for (const char* compression : {"none", "zstd"}) {
    SCOPED_TRACE(compression);
    fs::remove_all(store());
    config_.compression = compression;
    FillAndSeal();
    const auto keys = [&](const fs::path& path) {
      std::multiset<std::string> found;
      const ByteFile file(path);
      const uint64_t before = AllocatedBytes();
      ByteWindow window(file, kMiB);
      FindRecords(&window, 0, [&](std::string_view key, auto&) { found.emplace(key); });
      // All that was ever taken, which is more than the most at once.
      EXPECT_LT(AllocatedBytes() - before, 3 * kMiB);
      return found;
    };
    const auto expected = keys(TableOf(1));
    EXPECT_GE(expected.size(), kPerChunk);
    EXPECT_EQ(keys(MakeLong(1)), expected);
    ExpectAllThrough(kSearchWindowBytes);
  }
}

// A frame that says that it is 2 GiB, in as many bytes as that needs and in fewer.
TEST_F(SalvageTest, AFrameIsNotBelievedBeyondItsBytes) {
  std::string frame("\x28\xB5\x2F\xFD\xA0", 5);  // size in four bytes, one segment
  frame += std::string("\0\0\0\x80", 4);
  for (int i = 1; i < 16384; ++i) frame += std::string("\x02\0\x10\0", 4);
  frame += std::string("\x03\0\x10\0", 4);  // the last 128 KiB of zeros
  const uint64_t before = AllocatedBytes();
  for (const size_t bytes : {frame.size(), size_t{30}}) {
    std::string table = frame.substr(0, bytes) + std::string(64, '\1');
    ByteWindow window(table);
    FindRecords(&window, 0, [](auto, auto&) { ADD_FAILURE(); });
  }
  EXPECT_LT(AllocatedBytes() - before, kMiB);
}

TEST_F(SalvageTest, SealsGoWhenAWriterComes) {
  FillAndSeal();
  EXPECT_TRUE(VerifyStore(store()).sealed);
  { const ShardOwner owner(store(), config_, 0, 1); }
  const VerifyReport report = VerifyStore(store());
  EXPECT_TRUE(report.sound());
  EXPECT_FALSE(report.sealed);
}

// A table that changed before the store was opened again must not be sealed as it is.
TEST_F(SalvageTest, ANewSealKeepsWhatTablesWere) {
  FillAndSeal();
  const fs::path table = TableOf(0);
  Damage(table, fs::file_size(table) / 2);
  ShardOwner(store(), config_, 0, 1).Finish();
  EXPECT_FALSE(VerifyStore(store()).sound());
}

// Files of two stores in one folder: sound, each by itself.
TEST_F(SalvageTest, ASequenceThatTwoChunksNameIsKeptOnce) {
  Create();
  ShardOwner owner(store(), config_, 0, 1);
  for (uint32_t c = 0; c < 2; ++c) {
    ChunkWriter writer(store(), config_, c, "t");
    writer.Add(RandomTrace(c, shape_));
    writer.Add(RandomTrace(7, shape_));
    writer.Finish();
    owner.Ingest(c, "t");
  }
  owner.Finish();
  EXPECT_EQ(SalvageIt().sequences, 3u);
}

TEST_F(SalvageTest, RecordsOfAnotherKindThanTheStoresAreLost) {
  Create();
  ShardOwner owner(store(), config_, 0, 1);
  ChunkWriter writer(store(), config_, 0, "t");
  writer.Add(RandomTrace(1, shape_));
  shape_.top_k = 1;
  writer.Add(RandomTrace(2, shape_));
  writer.Finish();
  owner.Ingest(0, "t");
  owner.Finish();
  const SalvageReport report = SalvageIt();
  EXPECT_EQ(report.sequences, 1u);
  EXPECT_EQ(report.lost_ids, std::vector<uint64_t>{2});
}

}  // namespace
}  // namespace routecast
