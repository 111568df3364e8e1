#pragma once

#include <unistd.h>

#include <cstdlib>
#include <string>

#include "common/files.h"

namespace routecast {

// A folder of its own for one test, removed at the end.
class TempFolder {
 public:
  TempFolder() {
    // In memory where that is: tests of crashes are about order, not about the disk.
    const bool memory = ::access("/dev/shm", W_OK) == 0;
    const fs::path base = memory ? fs::path("/dev/shm") : fs::temp_directory_path();
    std::string name = (base / "routecast-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) std::abort();
    path_ = name;
  }
  ~TempFolder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

}  // namespace routecast
