#include "common/output_folder.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/errors.h"

namespace routecast {
namespace {

class OutputFolderTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::path(testing::TempDir()) /
              testing::UnitTest::GetInstance()->current_test_info()->name();
    fs::remove_all(folder_);
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }
  void Write(const std::string& name, const std::string& text) {
    WriteFileAtomic(folder_ / name, text);
  }
  // What is said of it; empty: nothing.
  std::string Refusal(FolderKind own = FolderKind::kOther) const {
    try {
      RequireOutput("--out", folder_, own);
    } catch (const UsageError& e) {
      return e.what();
    }
    return "";
  }

  fs::path folder_;
};

TEST_F(OutputFolderTest, AFolderOfOtherFilesIsTaken) {
  Write("run.json", "{}");
  EXPECT_EQ(Refusal(), "");
}

TEST_F(OutputFolderTest, WhatIsNotThereIsTaken) {
  RequireOutput("--out", folder_ / "new");
  RequireOutput("--out", "");
}

TEST_F(OutputFolderTest, AStoreIsRefused) {
  Write("store.json", "{}");
  EXPECT_THAT(Refusal(FolderKind::kPredictor), testing::HasSubstr("is a trace store"));
  EXPECT_EQ(Refusal(FolderKind::kStore), "");
}

TEST_F(OutputFolderTest, ACheckpointIsRefused) {
  Write("config.json", R"({"model_type": "switch_transformers"})");
  EXPECT_THAT(Refusal(FolderKind::kPredictor), testing::HasSubstr("is a checkpoint"));
  EXPECT_EQ(Refusal(FolderKind::kCheckpoint), "");
}

TEST_F(OutputFolderTest, APredictorIsRefused) {
  Write("config.json", R"({"format": "routecast-speculation"})");
  EXPECT_THAT(Refusal(), testing::HasSubstr("is a trained predictor"));
  EXPECT_EQ(Refusal(FolderKind::kPredictor), "");
}

TEST_F(OutputFolderTest, ADamagedConfigurationIsNobodys) {
  for (const char* text : {"", "{", "[1]", "7"}) {
    Write("config.json", text);
    EXPECT_EQ(Refusal(), "") << text;
  }
}

TEST_F(OutputFolderTest, AFileIsRefused) {
  Write("file", "");
  EXPECT_THROW(RequireOutput("--out", folder_ / "file"), UsageError);
}

}  // namespace
}  // namespace routecast
