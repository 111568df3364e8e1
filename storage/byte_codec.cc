#include "storage/byte_codec.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <utility>

#include "common/errors.h"
#include "common/routing.h"
#include "common/wide_loops.h"

namespace routecast {
static_assert(std::endian::native == std::endian::little,
              "records are written as they lie");

void ByteWriter::U64(uint64_t value) { Raw(&value, sizeof value); }

void ByteWriter::Varint(uint64_t value) {
  while (value >= 0x80) {
    U8(static_cast<uint8_t>(value | 0x80));
    value >>= 7;
  }
  U8(static_cast<uint8_t>(value));
}

void ByteWriter::Packed(const std::vector<uint16_t>& values, int bits) {
  const size_t start = out_->size();
  const uint64_t size = PackedBytes(values.size(), bits);
  out_->resize(start + size + 8);  // whole-word stores below may run past the end
  char* to = out_->data() + start;
  uint64_t pending = 0;
  int filled = 0;
  for (const uint16_t value : values) {
    pending |= static_cast<uint64_t>(value) << filled;
    filled += bits;
    if (filled >= 32) {
      std::memcpy(to, &pending, 4);
      to += 4;
      pending >>= 32;
      filled -= 32;
    }
  }
  std::memcpy(to, &pending, 8);
  out_->resize(start + size);
}

void ByteWriter::Flags(const std::vector<uint8_t>& flags) {
  constexpr uint64_t kGather = 0x0102040810204080;  // bit 0 of byte i to bit 56 + i
  for (size_t i = 0; i < flags.size(); i += 8) {
    uint64_t eight = 0;
    std::memcpy(&eight, flags.data() + i, std::min<size_t>(8, flags.size() - i));
    U8(static_cast<uint8_t>((eight * kGather) >> 56));
  }
}

// FloatToBf16 where the compiler can make vectors of it.
static inline uint16_t RoundedToBf16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t not_a_number = (bits >> 16) | 0x40;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? not_a_number
                                                                  : rounded);
}

void ByteWriter::Bf16Planes(const std::vector<float>& values) {
  const size_t start = out_->size(), n = values.size();
  out_->resize(start + 2 * n);
  auto* high = reinterpret_cast<uint8_t*>(out_->data() + start);
  uint8_t* low = high + n;
  const float* from = values.data();  // bytes may alias the vector's own pointer
  for (size_t i = 0; i < n; ++i) {
    const uint16_t bits = RoundedToBf16(from[i]);
    high[i] = static_cast<uint8_t>(bits >> 8);
    low[i] = static_cast<uint8_t>(bits);
  }
}

void ByteReader::Fail(const std::string& reason) const {
  throw DataError(
      ErrorText(where_ + ": damaged record", reason,
                "run routecast-trace verify; collect into a new store if it fails"));
}

void ByteReader::FailShort(uint64_t size) const {
  Fail("needs " + std::to_string(size) + " more bytes, has " + std::to_string(left()));
}

uint64_t ByteReader::U64() {
  uint64_t value;
  std::memcpy(&value, Raw(8).data(), 8);
  return value;
}

uint64_t ByteReader::Varint(const char* what, uint64_t limit) {
  uint64_t value = 0;
  for (int shift = 0; shift < 64; shift += 7) {
    const uint8_t byte = U8();
    if (shift == 63 && byte > 1) break;
    value |= static_cast<uint64_t>(byte & 0x7f) << shift;
    if (byte & 0x80) continue;
    if (value > limit) {
      Fail(std::string(what) + " is " + std::to_string(value) + ", at most " +
           std::to_string(limit));
    }
    return value;
  }
  Fail(std::string(what) + " is not a varint");
}

namespace {

// Eight values take exactly kBits bytes: two words hold them, and every shift is a
// constant. Returns how many values were unpacked; the rest is too near the end for whole
// words.
template <int kBits>
size_t UnpackGroups(const uint8_t* from, size_t size, size_t count, uint16_t* to) {
  constexpr uint64_t kMask = (uint64_t{1} << kBits) - 1;
  constexpr int kSkip = (kBits * 4) % 8;  // the fifth value may start at half a byte
  size_t i = 0;
  for (size_t at = 0; i + 8 <= count && at + 16 <= size; at += kBits, i += 8) {
    uint64_t low, high;
    std::memcpy(&low, from + at, 8);
    std::memcpy(&high, from + at + kBits / 2, 8);
    high >>= kSkip;
    for (int k = 0; k < 4; ++k) {
      to[i + k] = static_cast<uint16_t>((low >> (k * kBits)) & kMask);
      to[i + 4 + k] = static_cast<uint16_t>((high >> (k * kBits)) & kMask);
    }
  }
  return i;
}

// float of bf16 bits whose bytes lie apart.
[[gnu::always_inline]] inline void JoinBytes(const uint8_t* high, const uint8_t* low,
                                             size_t count, uint32_t* to) {
  for (size_t i = 0; i < count; ++i) {
    to[i] =
        (static_cast<uint32_t>(high[i]) << 24) | (static_cast<uint32_t>(low[i]) << 16);
  }
}

[[gnu::always_inline]] inline void WidenEach(const char* from, size_t count,
                                             uint32_t* to) {
  for (size_t i = 0; i < count; ++i) {
    uint16_t narrow;
    std::memcpy(&narrow, from + 2 * i, 2);
    to[i] = narrow;
  }
}

using Unpack = size_t (*)(const uint8_t*, size_t, size_t, uint16_t*);
template <size_t... kIndex>
constexpr std::array<Unpack, sizeof...(kIndex)> UnpackTable(
    std::index_sequence<kIndex...>) {
  return {&UnpackGroups<static_cast<int>(kIndex) + 1>...};
}
// What vectors can take of the work; what is left, or all of it, is the plain loops'.
#if defined(__x86_64__)
// 16 values at a time, kBits <= 8: each half of a vector takes the kBits bytes of eight,
// each of its lanes the two bytes that a value lies in, which a product shifts to the
// top.
template <int kBits>
[[gnu::target("avx2")]] size_t UnpackGroupsWide(const uint8_t* from, size_t size,
                                                size_t count, uint16_t* to) {
  alignas(16) char bytes[16];
  alignas(16) uint16_t shifts[8];
  for (int k = 0; k < 8; ++k) {
    const int first = k * kBits / 8;
    bytes[2 * k] = static_cast<char>(first);
    bytes[2 * k + 1] = static_cast<char>(first + 1);
    shifts[k] = static_cast<uint16_t>(1u << (16 - kBits - k * kBits % 8));
  }
  const __m256i order =
      _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<__m128i*>(bytes)));
  const __m256i shift =
      _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<__m128i*>(shifts)));
  size_t i = 0;
  for (size_t at = 0; i + 16 <= count && at + kBits + 16 <= size;
       at += 2 * kBits, i += 16) {
    const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at));
    const __m128i second =
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at + kBits));
    const __m256i packed =
        _mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1);
    const __m256i top = _mm256_mullo_epi16(_mm256_shuffle_epi8(packed, order), shift);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_srli_epi16(top, 16 - kBits));
  }
  return i;
}

// 32 flags at a time: each byte looks at its own bit of one of four.
[[gnu::target("avx2")]] size_t UnpackFlagsWide(const char* from, size_t count,
                                               uint8_t* to) {
  const __m256i order =
      _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i own = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  size_t i = 0;
  for (; i + 32 <= count; i += 32) {
    int32_t bits;
    std::memcpy(&bits, from + i / 8, sizeof bits);
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), order);
    const __m256i is = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, own), own);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_and_si256(is, _mm256_set1_epi8(1)));
  }
  return i;
}

template <size_t... kIndex>
constexpr std::array<Unpack, sizeof...(kIndex)> WideTable(
    std::index_sequence<kIndex...>) {
  return {&UnpackGroupsWide<static_cast<int>(kIndex) + 1>...};
}

size_t UnpackWide(const uint8_t* from, size_t size, int bits, size_t count,
                  uint16_t* to) {
  static constexpr auto kWide = WideTable(std::make_index_sequence<8>());
  if (bits > 8 || !HasAvx2()) return 0;
  return kWide[static_cast<size_t>(bits - 1)](from, size, count, to);
}

[[gnu::target("avx2")]] void JoinBytesWide(const uint8_t* high, const uint8_t* low,
                                           size_t count, uint32_t* to) {
  JoinBytes(high, low, count, to);
}

[[gnu::target("avx2")]] void WidenTokensWide(const char* from, size_t count,
                                             uint32_t* to) {
  WidenEach(from, count, to);
}
#else
size_t UnpackWide(const uint8_t*, size_t, int, size_t, uint16_t*) { return 0; }
size_t UnpackFlagsWide(const char*, size_t, uint8_t*) { return 0; }
constexpr auto JoinBytesWide = JoinBytes;
constexpr auto WidenTokensWide = WidenEach;
#endif

// How many values were unpacked, a multiple of eight.
size_t UnpackMost(const uint8_t* from, size_t size, int bits, size_t count,
                  uint16_t* to) {
  static constexpr auto kUnpack = UnpackTable(std::make_index_sequence<16>());
  const auto index = static_cast<size_t>(bits - 1);
  const size_t done = UnpackWide(from, size, bits, count, to);
  const size_t bytes = done / 8 * static_cast<size_t>(bits);
  return done + kUnpack[index](from + bytes, size - bytes, count - done, to + done);
}

}  // namespace

void WidenTokens(std::string_view bytes, std::vector<uint32_t>* tokens) {
  uint32_t* to = tokens->data();
  if (HasAvx2()) return WidenTokensWide(bytes.data(), tokens->size(), to);
  WidenEach(bytes.data(), tokens->size(), to);
}

void UnpackBits(std::string_view bytes, int bits, std::vector<uint16_t>* values) {
  const auto* from = reinterpret_cast<const uint8_t*>(bytes.data());
  const size_t count = values->size();
  const size_t most = UnpackMost(from, bytes.size(), bits, count, values->data());
  if (most == count) return;
  // Whole words would run past the last bytes, fewer than 16: from a longer copy.
  const size_t left = count - most;
  uint8_t last[48] = {};
  uint16_t unpacked[16 * 8];
  std::memcpy(last, from + most / 8 * static_cast<size_t>(bits), PackedBytes(left, bits));
  UnpackMost(last, sizeof last, bits, (left + 7) / 8 * 8, unpacked);
  std::memcpy(values->data() + most, unpacked, left * sizeof(uint16_t));
}

void UnpackFlags(std::string_view bytes, std::vector<uint8_t>* flags) {
  constexpr uint64_t kEach = 0x0101010101010101, kOwnBit = 0x8040201008040201;
  size_t i = HasAvx2() ? UnpackFlagsWide(bytes.data(), flags->size(), flags->data()) : 0;
  for (; i < flags->size(); i += 8) {
    const uint64_t bits = static_cast<uint8_t>(bytes[i / 8]) * kEach & kOwnBit;
    const uint64_t eight = (bits + 0x7f * kEach) >> 7 & kEach;  // 1 where a bit is
    std::memcpy(flags->data() + i, &eight, std::min<size_t>(8, flags->size() - i));
  }
}

void UnpackBf16Planes(std::string_view bytes, std::vector<float>* values) {
  const size_t n = values->size();
  const auto* high = reinterpret_cast<const uint8_t*>(bytes.data());
  const uint8_t* low = high + n;
  auto* to = reinterpret_cast<uint32_t*>(values->data());
  if (HasAvx2()) return JoinBytesWide(high, low, n, to);
  JoinBytes(high, low, n, to);
}

}  // namespace routecast
