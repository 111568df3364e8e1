// The dry run's estimate of the disk counts what is recorded.
#include "collector/store_estimate.h"

#include <gtest/gtest.h>

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

// A table file a chunk and family, of all shards beside a rank's own.
TEST(StoreEstimateTest, OpenFilesGrowWithTheChunks) {
  StoreConfig config = Config({"attention", "hidden", "ids"});
  config.num_chunks = 0;
  const uint64_t none = EstimatedOpenFiles(config, 4);
  config.num_chunks = 1000;
  EXPECT_EQ(EstimatedOpenFiles(config, 4) - none, 3000u + 750u);
  config = Config({"ids"});
  config.num_chunks = 1000;
  EXPECT_EQ(EstimatedOpenFiles(config, 4) - none, 1000u + 250u);
}

TEST(StoreEstimateTest, TheEncoderAloneHasNoDecodersRecords) {
  StoreConfig encode = Config({"hidden", "ids", "output"});
  encode.task = Task::kEncode;
  EXPECT_NEAR(EstimatedStoreBytes(encode, kText), 1e6 * 6 * (5.2 + 0.1 * 768 * 2), 1e3);
}

}  // namespace
}  // namespace routecast
