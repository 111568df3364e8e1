// A file of our own making, mapped: the texts of the cached index, which all ranks of a
// host share and read at random. It is written whole and sealed before anybody maps it;
// foreign files, which others may cut while we read, go through SourceFile. Thread rule:
// immutable; any number of threads.
#pragma once

#include <string_view>

#include "common/files.h"

namespace routecast {

class MappedFile {
 public:
  // Throws UsageError (missing, not a file), EnvironmentError (it cannot be mapped).
  explicit MappedFile(const fs::path& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  std::string_view bytes() const { return {static_cast<const char*>(data_), size_}; }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace routecast
