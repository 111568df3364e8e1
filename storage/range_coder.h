// A byte-wise range coder with carry: codes intervals [start, start + size) of a total.
// Source: G. N. N. Martin, "Range encoding" (1979), with the carry kept as a run of
// pending bytes. Trailing zero bytes are cut off: the decoder reads zeros past the end.
// Thread rule: an object belongs to one thread.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>

namespace routecast {

inline constexpr uint32_t kMaxCoderTotal = 1u << 16;

class RangeEncoder {
 public:
  // Appends to `out`, which must outlive it.
  explicit RangeEncoder(std::string* out) : out_(out), begin_(out->size()) {}
  // REQUIRES 0 < size, start + size <= total <= kMaxCoderTotal.
  void Encode(uint32_t start, uint32_t size, uint32_t total) {
    range_ /= total;
    low_ += uint64_t{range_} * start;
    range_ *= size;
    while (range_ < kBottom) {
      range_ <<= 8;
      ShiftLow();
    }
  }
  // Writes the shortest bytes that mean a number in the last interval.
  void Finish() {
    for (int zeros = 24; zeros >= 0; zeros -= 8) {
      const uint64_t mask = (uint64_t{1} << zeros) - 1;
      const uint64_t value = (low_ + mask) & ~mask;
      if (value - low_ >= range_) continue;
      low_ = value;
      break;
    }
    for (int i = 0; i < 5; ++i) ShiftLow();
    while (out_->size() > begin_ && out_->back() == '\0') out_->pop_back();
  }

 private:
  static constexpr uint32_t kBottom = 1u << 24;
  void ShiftLow() {
    const bool carry = low_ >> 32;
    if (carry || static_cast<uint32_t>(low_) < 0xFF000000u) {
      // Before the first byte nothing is pending, and nothing can carry into it.
      if (has_cache_) out_->push_back(static_cast<char>(cache_ + carry));
      for (; pending_ > 0; --pending_) out_->push_back(static_cast<char>(0xFF + carry));
      cache_ = static_cast<uint8_t>(low_ >> 24);
      has_cache_ = true;
    } else {
      ++pending_;
    }
    low_ = (low_ & 0x00FFFFFFu) << 8;
  }

  std::string* out_;
  size_t begin_;
  uint64_t low_ = 0, pending_ = 0;
  uint32_t range_ = 0xFFFFFFFFu;
  uint8_t cache_ = 0;
  bool has_cache_ = false;
};

// Decodes any bytes to something: whoever calls it checks what came out.
class RangeDecoder {
 public:
  explicit RangeDecoder(std::string_view bytes) : bytes_(bytes) {
    for (int i = 0; i < 4; ++i) code_ = code_ << 8 | Next();
  }
  // Where in [0, total) the coded interval lies. REQUIRES 0 < total <= kMaxCoderTotal.
  uint32_t Peek(uint32_t total) {
    range_ /= total;
    return std::min(code_ / range_, total - 1);
  }
  // The interval that Peek's answer lies in.
  void Take(uint32_t start, uint32_t size) {
    code_ -= range_ * start;
    range_ *= size;
    while (range_ < kBottom) {
      range_ <<= 8;
      code_ = code_ << 8 | Next();
    }
  }
  // Bytes that an encoder may have written for what was taken so far.
  size_t read() const { return at_; }

 private:
  static constexpr uint32_t kBottom = 1u << 24;
  uint8_t Next() {
    const uint8_t byte = at_ < bytes_.size() ? static_cast<uint8_t>(bytes_[at_]) : 0;
    ++at_;
    return byte;
  }

  std::string_view bytes_;
  size_t at_ = 0;
  uint32_t range_ = 0xFFFFFFFFu, code_ = 0;
};

}  // namespace routecast
