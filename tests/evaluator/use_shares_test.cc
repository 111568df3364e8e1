#include "evaluator/use_shares.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>

#include "common/errors.h"

namespace routecast {
namespace {

constexpr MoeGeometry kGeometry{1, 1, 3, 1, 8};

class UseSharesTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ =
        fs::temp_directory_path() / ("use_shares_test." + std::to_string(::getpid()));
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }
  UseShares Read(const std::string& text) {
    WriteFileAtomic(folder_ / "load.csv", text);
    return ReadUseShares(folder_ / "load.csv", kGeometry);
  }
  // The words of the refusal, which are three lines at most.
  template <typename Error>
  std::string Refusal(const std::string& text) {
    try {
      Read(text);
    } catch (const Error& e) {
      const std::string words = e.what();
      EXPECT_LE(std::count(words.begin(), words.end(), '\n'), 2) << words;
      return words;
    }
    return "taken";
  }
  fs::path folder_;
};

constexpr char kSound[] =
    "layer_id,expert_id,count\n0,0,6\n0,1,2\n0,2,0\n1,0,1\n1,1,0\n1,2,9\n";

TEST_F(UseSharesTest, SharesAreOfTheirLayer) {
  const UseShares shares = Read(kSound);
  EXPECT_EQ(shares.by_key, (std::vector<double>{.75, .25, 0, .1, 0, .9}));
  EXPECT_EQ(shares.source, (folder_ / "load.csv").string());
}

TEST_F(UseSharesTest, LinesMayEndAsOnWindows) {
  std::string text = kSound;
  for (size_t at = 0; (at = text.find('\n', at)) != std::string::npos; at += 2)
    text.replace(at, 1, "\r\n");
  EXPECT_EQ(Read(text).by_key[5], .9);
}

TEST_F(UseSharesTest, ALayerThatNobodyUsedHasNoShares) {
  const UseShares shares = Read("layer_id,expert_id,count\n0,0,4\n0,1,4\n1,2,0\n");
  EXPECT_EQ(shares.by_key, (std::vector<double>{.5, .5, 0, 0, 0, 0}));
}

TEST_F(UseSharesTest, TheMostUsedComeLastAndTheUnusedNotAtAll) {
  const UseShares shares = Read(kSound);
  std::vector<ExpertKey> all;
  for (int i = 0; i < kGeometry.num_keys(); ++i)
    all.push_back(ExpertKey::FromIndex(i, kGeometry));
  EXPECT_EQ(MostUsed(shares, kGeometry, all, 2),
            (std::vector<ExpertKey>{{0, 0}, {1, 2}}));
  EXPECT_EQ(MostUsed(shares, kGeometry, all, 6),
            (std::vector<ExpertKey>{{1, 0}, {0, 1}, {0, 0}, {1, 2}}));
  EXPECT_EQ(MostUsed(shares, kGeometry, {{0, 1}, {0, 2}}, 6),
            (std::vector<ExpertKey>{{0, 1}}));
}

TEST_F(UseSharesTest, WhatIsNoTableIsNamedWithItsLine) {
  const std::string header = "layer_id,expert_id,count\n";
  for (const std::string& bad :
       {std::string(), std::string("0,0,6\n"), header + "0,0\n", header + "0,0,six\n",
        header + "0,0,6,7\n", header + "0,-1,6\n", header + "\n",
        header + "0,18446744073709551615,1\n", header + "99999999,0,1\n"}) {
    EXPECT_NE(Refusal<DataError>(bad).find("not a table of uses"), std::string::npos)
        << bad;
  }
  EXPECT_NE(Refusal<DataError>(header + "0,0,6\nx,0,1\n").find("line 3"),
            std::string::npos);
}

TEST_F(UseSharesTest, AnotherGeometryIsNamedWithBothSizes) {
  const std::string words =
      Refusal<UsageError>("layer_id,expert_id,count\n0,0,6\n3,7,1\n");
  EXPECT_NE(words.find("4 MoE layers x 8 experts, here are 2 x 3"), std::string::npos)
      << words;
  EXPECT_NE(Refusal<UsageError>("layer_id,expert_id,count\n0,2,6\n").find("geometry"),
            std::string::npos);
}

TEST_F(UseSharesTest, AMissingFileIsUsage) {
  EXPECT_THROW(ReadUseShares(folder_ / "none.csv", kGeometry), UsageError);
}

}  // namespace
}  // namespace routecast
