// Running a reference implementation in Python from a test.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <string>

#include "common/files.h"

namespace routecast {

inline std::string EnvOr(const char* name, const std::string& fallback) {
  const char* value = std::getenv(name);
  return value ? value : fallback;
}

// A fresh folder under the build's test data; emptied at each call.
inline fs::path TestFolder(const std::string& name) {
  const fs::path folder =
      fs::path(EnvOr("ROUTECAST_BUILD_DIR", fs::temp_directory_path().string())) /
      "test-data" / name;
  fs::remove_all(folder);
  fs::create_directories(folder);
  return folder;
}

// Runs tests/golden/SCRIPT with the locked Python environment; returns its exit status.
// launch/test.sh sets ROUTECAST_PYTHON; without it golden tests fail rather than pass
// unseen.
inline int RunReference(const std::string& script, const std::string& arguments) {
  const std::string python = EnvOr("ROUTECAST_PYTHON", "");
  EXPECT_FALSE(python.empty()) << "set ROUTECAST_PYTHON (launch/test.sh does)";
  const std::string root = EnvOr("ROUTECAST_SOURCE_DIR", ".");
  // Freed memory is kept: clearing it anew for every large tensor took half of the time.
  const std::string keep =
      "MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 ";
  return std::system(
      (keep + python + " " + root + "/tests/golden/" + script + " " + arguments).c_str());
}

}  // namespace routecast
