// The bytes of a foreign file from its start on, unpacked where its name ends in .zst or
// .gz. Thread rule: one thread. Errors: DataError as RefuseImport throws it. Memory: a
// mebibyte of the file and one of what is unpacked.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "common/byte_file.h"

namespace routecast {

// One way of packing.
class Unpacker {
 public:
  virtual ~Unpacker() = default;
  // Takes from `in` and fills `out` from its start. Returns how much of each was used.
  // Throws std::runtime_error with what the library says of damage.
  struct Used {
    size_t in = 0, out = 0;
  };
  virtual Used Unpack(std::string_view in, std::string* out) = 0;
  virtual bool AtEnd() const = 0;  // nothing is missing from what was taken
};

class PackedStream {
 public:
  explicit PackedStream(const fs::path& path);

  // REQUIRES offset not below the end of the last read. Memory grows with what is there,
  // not with what is asked for.
  std::string Read(uint64_t offset, uint64_t count, const std::string& where);
  // The next bytes, valid until the next call; empty at the end. A packed file that ends
  // early is refused.
  std::string_view NextPart();
  // All bytes of the file; nothing can be read afterwards.
  uint64_t Size();

 private:
  void Fill(uint64_t wanted, const std::string& where);
  bool Next();
  void Take();
  void Unpack();

  const ByteFile file_;
  const std::unique_ptr<Unpacker> unpacker_;  // null where the file is not packed
  std::string input_, buffer_;
  size_t input_at_ = 0;
  bool pending_ = false;   // the decoder may hold bytes that found no room
  std::string_view left_;  // of buffer_
  uint64_t file_at_ = 0;   // of the file, after input_
  uint64_t at_ = 0;        // of the unpacked bytes, before left_
};

}  // namespace routecast
