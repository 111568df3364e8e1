// However many chunks a store has, few of its files are open at once.
#include <gtest/gtest.h>

#include <algorithm>

#include "common/open_files.h"
#include "tests/storage/store_fixture.h"
#include "tests/support/file_limit.h"

namespace routecast {
namespace {

class OpenTables : public TraceStoreTest {
 protected:
  static constexpr int64_t kMany = 120;
  static constexpr int kShards = 2;
  OpenTables() {
    shape_.hidden_share = 1;
    shape_.max_tokens = 8;
    config_ = ConfigOf(shape_, kShards, kMany);
  }
  std::vector<uint64_t> Ids() const { return TraceReader(store()).sequence_ids(); }
};

TEST_F(OpenTables, OfAWriterAreFewInEveryShard) {
  const FileLimit limit(4000);
  Create();
  const uint64_t before = OpenFilesLeft();
  uint64_t least = before;
  ShardOwner owner(store(), config_, 0, 1);
  for (uint32_t c = 0; c < kMany; ++c) {
    StageChunk(store(), config_, c, 1, shape_, "t");
    ASSERT_TRUE(owner.Ingest(c, "t"));
    least = std::min(least, OpenFilesLeft());
  }
  EXPECT_LE(before - least, 20u * kShards);
}

// 60 chunks a shard: more than may be open of them all.
TEST_F(OpenTables, AStoreOfManyChunksIsFinishedAndReadWithFewFiles) {
  const FileLimit limit(100);
  Create();
  {
    ShardOwner owner(store(), config_, 0, 1);
    for (uint32_t c = 0; c < kMany; ++c) {
      StageChunk(store(), config_, c, 1, shape_, "t");
      ASSERT_TRUE(owner.Ingest(c, "t"));
    }
    EXPECT_EQ(Ids().size(), size_t{kMany}) << "while it is being written";
    owner.Finish();
  }
  const TraceReader reader(store());
  size_t scanned = 0;
  reader.Scan([&](RoutingTrace&&) { ++scanned; }, WithHidden::kNo);
  EXPECT_EQ(scanned, size_t{kMany});
  const uint64_t last = reader.sequence_ids().back();
  EXPECT_EQ(reader.Read(last, WithHidden::kYes), RandomTrace(last, shape_));
}

// Of an unfinished store: where records are still in a table a chunk.
TEST_F(OpenTables, AScanOfAnUnfinishedStoreHasTheFilesItTakes) {
  const FileLimit limit(100);
  Create();
  ShardOwner owner(store(), config_, 0, 1);
  for (uint32_t c = 0; c + 1 < kMany; ++c) {
    StageChunk(store(), config_, c, 1, shape_, "t");
    ASSERT_TRUE(owner.Ingest(c, "t"));
  }
  size_t scanned = 0;
  const TraceReader reader(store());
  reader.Scan([&](RoutingTrace&&) { ++scanned; }, WithHidden::kNo);
  EXPECT_EQ(scanned, size_t{kMany - 1});
}

TEST_F(OpenTables, AReaderKeepsAllOpenWhereTheyAreFew) {
  Create();
  {
    ShardOwner owner(store(), config_, 0, 1);
    for (uint32_t c = 0; c < 50; ++c) {
      StageChunk(store(), config_, c, 1, shape_, "t");
      ASSERT_TRUE(owner.Ingest(c, "t"));
    }
  }
  const FileLimit limit(1000);
  const uint64_t before = OpenFilesLeft();
  const TraceReader reader(store());
  EXPECT_GE(before - OpenFilesLeft(), 100u) << "of either family one a chunk";
}

}  // namespace
}  // namespace routecast
