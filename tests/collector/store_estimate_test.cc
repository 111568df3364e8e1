// The dry run's estimate of the disk counts what is recorded.
#include "collector/store_estimate.h"

#include <gtest/gtest.h>

#include "common/errors.h"
#include "storage/trace_reader.h"
#include "storage/trace_store.h"
#include "tests/storage/random_trace.h"
#include "tests/storage/temp_folder.h"
#include "tests/support/file_limit.h"

namespace routecast {
namespace {

constexpr TextTokens kText = {1e6, 0.1e6};

StoreConfig Config(std::vector<std::string> record) {
  StoreConfig c;
  c.geometry = {6, 6, 128, 1, 768};
  c.record = std::move(record);
  c.hidden_share = c.Records("hidden") ? 0.1 : 0;
  c.attention_heads = c.Records("attention") ? 12 : 0;
  return c;
}

uint64_t Estimate(std::vector<std::string> record) {
  return EstimatedStoreBytes(Config(std::move(record)), kText);
}

TEST(StoreEstimateTest, CountsRouterInputsOfTheirShare) {
  EXPECT_NEAR(Estimate({"hidden", "ids"}) - Estimate({"ids"}), 0.1 * 1e6 * 12 * 768 * 2,
              1e3);
}

TEST(StoreEstimateTest, CountsTheDecodersOutput) {
  EXPECT_NEAR(Estimate({"hidden", "ids", "output"}) - Estimate({"hidden", "ids"}),
              0.1 * 1e6 * 768 * 2, 1e3);
}

TEST(StoreEstimateTest, CountsAttentionOfBothKindsInTheDecoder) {
  EXPECT_NEAR(Estimate({"attention", "hidden", "ids"}) - Estimate({"hidden", "ids"}),
              0.1 * 1e6 * 6 * (12 + 24) * 10, 1e3);
}

TEST(StoreEstimateTest, CountsTheTopK) {
  StoreConfig with = Config({"ids", "topk"});
  with.top_k = 8;
  EXPECT_NEAR(EstimatedStoreBytes(with, kText) - Estimate({"ids"}),
              1e6 * 12 * 8 * (2 + 7.0 / 8), 1e3);
}

constexpr int64_t kManyChunks = 480;
constexpr TraceShape kShape = {.max_tokens = 4, .hidden_share = 1, .heads = 2};

StoreConfig Sharded() { return ConfigOf(kShape, /*shards=*/16, kManyChunks); }

// What rank 0 does with its store, of many chunks, where it may open so many files.
void CollectWith(uint64_t files) {
  const TempFolder folder;
  const StoreConfig config = Sharded();
  const FileLimit limit(files);
  TraceStore::CreateOrOpen(folder.path(), config);
  ShardOwner owner(folder.path(), config, 0, 1);
  for (uint32_t chunk = 0; chunk < kManyChunks; ++chunk) {
    StageChunk(folder.path(), config, chunk, 1, kShape, "t");
    owner.Ingest(chunk, "t");
  }
  DeclareLeftOut(folder.path());
  TraceReader(folder.path()).Scan([](RoutingTrace&&) {}, WithHidden::kNo);
  owner.Finish();
}

TEST(StoreEstimateTest, OpenFilesAreEnoughForAJob) {
  EXPECT_NO_THROW(CollectWith(EstimatedOpenFiles(Sharded(), 1)));
}

TEST(StoreEstimateTest, OpenFilesAreNotTwiceWhatAJobTakes) {
  EXPECT_THROW(CollectWith(EstimatedOpenFiles(Sharded(), 1) / 2), EnvironmentError);
}

TEST(StoreEstimateTest, TheEncoderAloneHasNoDecodersRecords) {
  StoreConfig encode = Config({"hidden", "ids", "output"});
  encode.task = Task::kEncode;
  EXPECT_NEAR(EstimatedStoreBytes(encode, kText), 1e6 * 6 * (5.2 + 0.1 * 768 * 2), 1e3);
}

}  // namespace
}  // namespace routecast
