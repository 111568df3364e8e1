#include "common/errors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cerrno>

namespace routecast {
namespace {

TEST(ErrorText, SkipsEmptyLines) {
  EXPECT_EQ(ErrorText("a", "b", "c"), "a\n  b\n  c");
  EXPECT_EQ(ErrorText("a", "", "c"), "a\n  c");
  EXPECT_EQ(ErrorText("a", "", ""), "a");
}

TEST(ThrowErrno, WhoCanMendItDecidesTheType) {
  EXPECT_THROW(ThrowErrno(ENOENT, "open", "p"), UsageError);
  EXPECT_THROW(ThrowErrno(EACCES, "open", "p"), UsageError);
  EXPECT_THROW(ThrowErrno(ENOSPC, "write", "p"), EnvironmentError);
  EXPECT_THROW(ThrowErrno(EIO, "read", "p"), EnvironmentError);
  EXPECT_THROW(ThrowErrno(EMFILE, "open", "p"), EnvironmentError);
}

TEST(DidYouMean, NamesOnlyWhatLooksLikeIt) {
  EXPECT_EQ(DidYouMean("oracel", {"oracle", "top_k"}), "did you mean oracle?");
  EXPECT_EQ(DidYouMean("treads", {"threads", "seed"}, "--"), "did you mean --threads?");
  EXPECT_EQ(DidYouMean("npy", {"npz", "csv"}), "did you mean npz?");
  EXPECT_EQ(DidYouMean("greedy", {"on_demand", "top_k"}), "");
  EXPECT_EQ(DidYouMean("parquet", {"npz", "jsonl", "csv", "safetensors"}), "");
  EXPECT_EQ(DidYouMean("x", {}), "");
}

TEST(NearestName, SmallestEditDistance) {
  EXPECT_EQ(NearestName("hiden", {"interlayer", "hidden", "ensemble"}), "hidden");
  EXPECT_EQ(NearestName("", {"abc", "a"}), "a");
  EXPECT_EQ(NearestName("x", {}), "");
}

TEST(ParseChoice, IndexOrNearest) {
  EXPECT_EQ(ParseChoice("--k", "b", {"a", "b"}), 1);
  try {
    ParseChoice("--k", "orakle", {"none", "oracle"});
    FAIL() << "no error";
  } catch (const UsageError& e) {
    EXPECT_THAT(e.what(), ::testing::HasSubstr("did you mean oracle?"));
  }
}

}  // namespace
}  // namespace routecast
