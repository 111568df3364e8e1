// A range coder with carry: codes intervals [start, start + size) of a total.
// Source: G. N. N. Martin, "Range encoding" (1979); 64-bit range, four bytes at a time;
// a carry walks back into the bytes that are out. Trailing zero bytes are cut off: the
// decoder reads zeros past the end.
// Thread rule: an object belongs to one thread.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>

namespace routecast {

inline constexpr uint32_t kMaxCoderTotal = 1u << 31;

class RangeEncoder {
 public:
  // Appends to `out`, which must outlive it.
  explicit RangeEncoder(std::string* out) : out_(out), begin_(out->size()) {}
  // REQUIRES 0 < size, start + size <= total <= kMaxCoderTotal.
  void Encode(uint32_t start, uint32_t size, uint32_t total) {
    range_ /= total;
    Add(range_ * start);
    range_ *= size;
    if (range_ >> 32) return;
    range_ <<= 32;
    Shift(4);
  }
  // Writes the shortest bytes that mean a number in the last interval.
  void Finish() {
    for (int zeros = 56; zeros >= 0; zeros -= 8) {
      const uint64_t mask = (uint64_t{1} << zeros) - 1;
      const uint64_t step = (uint64_t{0} - low_) & mask;  // up to the next multiple
      if (step >= range_) continue;
      Add(step);
      break;
    }
    Shift(8);
    while (out_->size() > begin_ && out_->back() == '\0') out_->pop_back();
  }

 private:
  void Add(uint64_t amount) {
    low_ += amount;
    if (low_ >= amount) return;
    // All that was coded is below 1, so a byte that takes the carry is there.
    size_t at = out_->size();
    while (++(*out_)[--at] == '\0') {
    }
  }
  void Shift(int bytes) {
    for (int i = 0; i < bytes; ++i) {
      out_->push_back(static_cast<char>(low_ >> 56));
      low_ <<= 8;
    }
  }

  std::string* out_;
  size_t begin_;
  uint64_t low_ = 0, range_ = ~uint64_t{0};
};

// Decodes any bytes to something: whoever calls it checks what came out.
class RangeDecoder {
 public:
  explicit RangeDecoder(std::string_view bytes) : bytes_(bytes) {
    Shift();
    Shift();
  }
  // Where in [0, total) the coded interval lies. REQUIRES 0 < total <= kMaxCoderTotal.
  uint32_t Peek(uint32_t total) {
    range_ /= total;
    return static_cast<uint32_t>(std::min<uint64_t>(code_ / range_, total - 1));
  }
  // The interval that Peek's answer lies in.
  void Take(uint32_t start, uint32_t size) {
    code_ -= range_ * start;
    range_ *= size;
    if (range_ >> 32) return;
    range_ <<= 32;
    Shift();
  }
  // Bytes that an encoder may have written for what was taken so far.
  size_t read() const { return at_; }

 private:
  void Shift() {
    for (int i = 0; i < 4; ++i, ++at_) {
      code_ = code_ << 8 | (at_ < bytes_.size() ? static_cast<uint8_t>(bytes_[at_]) : 0);
    }
  }

  std::string_view bytes_;
  size_t at_ = 0;
  uint64_t range_ = ~uint64_t{0}, code_ = 0;
};

}  // namespace routecast
