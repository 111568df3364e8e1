#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <string>

#include "common/files.h"

namespace routecast {

// A fresh folder for one test, removed afterwards.
class TestFolder : public testing::Test {
 protected:
  void SetUp() override {
    const auto* info = testing::UnitTest::GetInstance()->current_test_info();
    folder_ = fs::temp_directory_path() /
              (std::string(info->name()) + "." + std::to_string(::getpid()));
    fs::remove_all(folder_);
    MakeFolder(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }
  // Writes a file and returns its path.
  std::string Write(const std::string& name, std::string_view bytes) {
    MakeFolder((folder_ / name).parent_path());
    WriteFileAtomic(folder_ / name, bytes);
    return (folder_ / name).string();
  }
  fs::path folder_;
};

}  // namespace routecast
