// Foreign files that must be refused: each by its own message, in three lines at most,
// without much memory.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "common/errors.h"
#include "common/files.h"

namespace routecast {

// Bytes that operator new gave out since the process began (allocation_count.cc).
uint64_t AllocatedBytes();

struct HostileCase {
  std::string name;
  std::map<std::string, std::string> files;  // name -> bytes
  std::string phrase;                        // of this message and of no other
};

// A fresh folder of this test, removed with the object.
class HostileFolder {
 public:
  HostileFolder()
      : path_(fs::temp_directory_path() / ("hostile." + std::to_string(::getpid()))) {
    fs::remove_all(path_);
    MakeFolder(path_);
  }
  ~HostileFolder() { fs::remove_all(path_); }
  const fs::path& path() const { return path_; }
  uint64_t Write(const std::map<std::string, std::string>& files) const {
    fs::remove_all(path_);
    MakeFolder(path_);
    uint64_t bytes = 0;
    for (const auto& [name, content] : files) {
      std::ofstream(path_ / name, std::ios::binary) << content;
      bytes += content.size();
    }
    return bytes;
  }

 private:
  fs::path path_;
};

// Gives every case to `read` (the folder that holds its files), which must throw a
// DataError.
inline void ExpectEachRefused(const std::vector<HostileCase>& cases,
                              const std::function<void(const fs::path&)>& read) {
  const HostileFolder folder;
  std::vector<std::string> messages;
  for (const HostileCase& c : cases) {
    const uint64_t file_bytes = folder.Write(c.files);
    const uint64_t before = AllocatedBytes();
    std::string message = "(accepted)";
    try {
      read(folder.path());
    } catch (const DataError& e) {
      message = e.what();
    }
    // A file may cost memory in proportion to its own size, whatever it promises.
    EXPECT_LT(AllocatedBytes() - before, (uint64_t{1} << 20) + 200 * file_bytes)
        << c.name;
    EXPECT_LE(std::count(message.begin(), message.end(), '\n'), 2) << message;
    EXPECT_THAT(message, testing::HasSubstr(c.phrase)) << c.name;
    messages.push_back(std::move(message));
  }
  for (size_t i = 0; i < cases.size(); ++i) {
    for (size_t j = 0; j < cases.size(); ++j) {
      if (i == j) continue;
      EXPECT_THAT(messages[j], testing::Not(testing::HasSubstr(cases[i].phrase)))
          << cases[j].name << " is refused in the words of " << cases[i].name;
    }
  }
}

}  // namespace routecast
