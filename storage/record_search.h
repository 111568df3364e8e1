// The records of a table file, found by their own checksums: neither its footer nor its
// index is asked. Internal to storage/.
// Thread rule: one thread an object.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

#include "common/byte_file.h"

namespace routecast {

inline constexpr size_t kSearchWindowBytes = size_t{1} << 20;

// Bytes that are not held at once: a file, of which a stretch is in memory; or all of
// what is in memory already. The file, or the memory, must outlive it.
class ByteWindow {
 public:
  explicit ByteWindow(const ByteFile& file, size_t bytes = kSearchWindowBytes);
  explicit ByteWindow(std::string_view all) : size_(all.size()), held_(all) {}
  uint64_t size() const { return size_; }
  // The bytes from `at` on that are held: `least` of them or more, fewer where they end
  // before. Valid until the next call. REQUIRES at <= size(), least <= the window.
  // EnvironmentError where the disk cannot read them, StoppedError on request.
  std::string_view From(uint64_t at, size_t least);

 private:
  const ByteFile* file_ = nullptr;
  uint64_t size_;
  std::string buffer_;
  std::string_view held_;
  uint64_t held_at_ = 0;
};

// Where a sound record lies in a table file.
struct RecordPlace {
  uint64_t at = 0;  // of the value, in the file or in the unpacked frame
  uint32_t bytes = 0;
  uint64_t frame = 0;        // of the compressed block
  uint32_t frame_bytes = 0;  // 0 = not compressed
};
// Finds every record of a table file whose checksum is right. `model`: the fingerprint of
// the store's context model; 0 = it has none. REQUIRES a window of 64 bytes or more.
// Memory: the window, and one compressed block at a time with what is in it: 2 GiB at
// most, and 1000 times the bytes that the file has for it.
void FindRecords(
    ByteWindow* table, uint64_t model,
    const std::function<void(std::string_view key, const RecordPlace&)>& found);
// The value that was found there. DataError where the file is not as it was.
std::string ReadRecord(const ByteFile& table, const RecordPlace& place);

}  // namespace routecast
