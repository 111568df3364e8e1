// Bounded little-endian reading and writing, and the planes that records are made of.
// Thread rule: an object is used by one thread.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace routecast {

// Appends to a string it does not own.
class ByteWriter {
 public:
  explicit ByteWriter(std::string* out) : out_(out) {}
  void U8(uint8_t value) { out_->push_back(static_cast<char>(value)); }
  void U64(uint64_t value);
  void Varint(uint64_t value);
  void Raw(const void* data, size_t size) {
    out_->append(static_cast<const char*>(data), size);
  }
  // `bits` (1..16) of each value, least significant first, padded to a whole byte.
  void Packed(const std::vector<uint16_t>& values, int bits);
  // A bit of each flag (0 or 1), least significant first, padded to a whole byte.
  void Flags(const std::vector<uint8_t>& flags);
  // bf16 of each value: all high bytes, then all low bytes (equal bytes lie side by
  // side).
  void Bf16Planes(const std::vector<float>& values);

 private:
  std::string* out_;
};

// Reads from bytes it does not own; every read that would leave them throws DataError.
class ByteReader {
 public:
  // `where` names the record in errors and must outlive the reader.
  ByteReader(std::string_view bytes, const std::string& where)
      : bytes_(bytes), where_(where) {}
  uint8_t U8() { return static_cast<uint8_t>(Raw(1)[0]); }
  uint64_t U64();
  // Throws also when the value is above `limit`, naming `what`.
  uint64_t Varint(const char* what, uint64_t limit);
  std::string_view Raw(uint64_t size) {
    if (size > left()) FailShort(size);
    const std::string_view part = bytes_.substr(at_, size);
    at_ += size;
    return part;
  }
  uint64_t left() const { return bytes_.size() - at_; }
  [[noreturn]] void Fail(const std::string& reason) const;

 private:
  [[noreturn]] void FailShort(uint64_t size) const;
  std::string_view bytes_;
  const std::string& where_;
  size_t at_ = 0;
};

inline uint64_t PackedBytes(uint64_t count, int bits) {
  return (count * static_cast<uint64_t>(bits) + 7) / 8;
}
// Each to its vector, which has the size that is wanted. REQUIRES as many bytes.
void WidenTokens(std::string_view bytes, std::vector<uint32_t>* tokens);
void UnpackBits(std::string_view bytes, int bits, std::vector<uint16_t>* values);
void UnpackFlags(std::string_view bytes, std::vector<uint8_t>* flags);
void UnpackBf16Planes(std::string_view bytes, std::vector<float>* values);

}  // namespace routecast
