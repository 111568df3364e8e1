// Files too large for memory: reads at an offset, and a streamed write that is there
// completely or not at all. Thread rule: an object belongs to one thread at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "common/files.h"

namespace routecast {

// A regular file, open for reads at an offset (pread). Throws UsageError (missing, not a
// file), EnvironmentError (I/O).
class ByteFile {
 public:
  explicit ByteFile(const fs::path& path);
  ~ByteFile();
  ByteFile(const ByteFile&) = delete;
  ByteFile& operator=(const ByteFile&) = delete;

  const fs::path& path() const { return path_; }
  uint64_t size() const { return size_; }  // bytes, as it was when opened
  // Reads exactly `count` bytes. DataError where the file ends before them.
  void Read(uint64_t offset, void* to, size_t count) const;
  std::string Read(uint64_t offset, size_t count) const;

 private:
  fs::path path_;
  int fd_ = -1;
  uint64_t size_ = 0;
};

// Hash64 of the whole file, read through a buffer of a MiB: equal to
// Hash64(ReadFile(path), seed). `on_block` is called after each MiB.
uint64_t HashFile(const fs::path& path, uint64_t seed = 0,
                  const std::function<void()>& on_block = {});

// Appends to a temporary file in the same folder; Commit syncs it and renames it to
// `path`. The destructor removes what was not committed. Throws EnvironmentError where
// the disk is full, also at once where `expected_bytes` are not free.
class AtomicFileWriter {
 public:
  AtomicFileWriter(const fs::path& path, uint64_t expected_bytes);
  ~AtomicFileWriter();
  AtomicFileWriter(const AtomicFileWriter&) = delete;
  AtomicFileWriter& operator=(const AtomicFileWriter&) = delete;

  void Append(const void* data, size_t count);
  uint64_t written() const { return written_; }
  void Commit();

 private:
  fs::path path_, temporary_;
  int fd_ = -1;
  uint64_t written_ = 0;
};

}  // namespace routecast
