#include "storage/salvage.h"

#include <fstream>

#include "common/errors.h"
#include "storage/verify.h"
#include "tests/storage/store_fixture.h"

namespace routecast {
namespace {

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

}  // namespace
}  // namespace routecast
