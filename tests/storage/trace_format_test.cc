#include "storage/trace_format.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>

#include "common/errors.h"
#include "storage/byte_codec.h"
#include "tests/storage/random_trace.h"

namespace routecast {
namespace {

std::string Key() { return EncodeKey(RecordKind::kEncoder, 7); }

TEST(TraceFormat, KeysSortAsIds) {
  EXPECT_LT(EncodeKey(RecordKind::kEncoder, 255), EncodeKey(RecordKind::kEncoder, 256));
  EXPECT_LT(EncodeKey(RecordKind::kEncoder, ~uint64_t{0}),
            EncodeKey(RecordKind::kDecoder, 0));
  EXPECT_LT(EncodeKey(RecordKind::kDecoder, ~uint64_t{0}),
            EncodeKey(RecordKind::kChunkMark, 0));
}

TEST(TraceFormat, EveryExpertCountRoundTrips) {
  for (const int experts : {1, 2, 3, 5, 8, 16, 100, 128, 129, 256, 257, 512, 1000, 2048,
                            4096, 8192, 16384, 32768, 65536}) {
    TraceShape shape;
    shape.num_experts = experts;
    for (uint64_t id = 0; id < 20; ++id) {
      const RoutingSpan span = RandomSpan(Mix(id, experts), shape, false);
      const std::string value = EncodeSpan(Key(), span, Task::kEncode, experts);
      const DecodedSpan back = DecodeSpan(Key(), value, "test");
      ASSERT_EQ(back.span, span) << experts;
      EXPECT_EQ(back.task, Task::kEncode);
      EXPECT_EQ(back.num_experts, experts);
    }
  }
}

TEST(TraceFormat, UnpackingAgreesWithSingleBits) {
  for (int bits = 1; bits <= 16; ++bits) {
    std::vector<uint16_t> values(203), back(203);
    for (size_t i = 0; i < values.size(); ++i)
      values[i] = Mix(bits, i) & ((1u << bits) - 1);
    std::string bytes;
    ByteWriter(&bytes).Packed(values, bits);
    ASSERT_EQ(bytes.size(), PackedBytes(values.size(), bits));
    for (size_t i = 0; i < values.size(); ++i) {
      for (int b = 0; b < bits; ++b) {
        const size_t at = i * bits + b;
        ASSERT_EQ((bytes[at / 8] >> (at % 8)) & 1, (values[i] >> b) & 1) << bits;
      }
    }
    UnpackBits(bytes, bits, &back);
    ASSERT_EQ(back, values) << bits;
  }
}

// The last values of a plane are too near its end for whole words.
TEST(TraceFormat, PlanesOfEveryLengthUnpack) {
  for (int bits = 1; bits <= 16; ++bits) {
    for (size_t n = 0; n < 150; ++n) {
      std::vector<uint16_t> values(n), back(n);
      for (size_t i = 0; i < n; ++i) values[i] = Mix(bits, i) & ((1u << bits) - 1);
      std::string bytes;
      ByteWriter(&bytes).Packed(values, bits);
      UnpackBits(bytes, bits, &back);
      ASSERT_EQ(back, values) << bits << " bits, " << n;
    }
  }
}

TEST(TraceFormat, TokensOfEveryLengthWiden) {
  for (size_t n = 0; n < 70; ++n) {
    std::vector<uint16_t> narrow(n);
    for (size_t i = 0; i < n; ++i) narrow[i] = static_cast<uint16_t>(Mix(n, i));
    std::vector<uint32_t> tokens(n);
    WidenTokens({reinterpret_cast<const char*>(narrow.data()), 2 * n}, &tokens);
    ASSERT_EQ(tokens, std::vector<uint32_t>(narrow.begin(), narrow.end())) << n;
  }
}

TEST(TraceFormat, FlagsAreBitsOfOne) {
  for (size_t n = 0; n < 100; ++n) {
    std::vector<uint8_t> flags(n), back(n);
    for (size_t i = 0; i < n; ++i) flags[i] = Mix(n, i) % 3 == 0;
    std::string bytes, packed;
    ByteWriter(&bytes).Flags(flags);
    ByteWriter(&packed).Packed(std::vector<uint16_t>(flags.begin(), flags.end()), 1);
    EXPECT_EQ(bytes, packed) << n;
    UnpackFlags(bytes, &back);
    EXPECT_EQ(back, flags) << n;
  }
}

TEST(TraceFormat, PlanesOfFloatsAreBf16) {
  std::vector<float> values = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, -NAN, 3e38f};
  for (uint64_t i = 0; i < 5000; ++i) {  // any bits
    values.push_back(std::bit_cast<float>(static_cast<uint32_t>(Mix(5, i))));
  }
  std::string bytes;
  ByteWriter(&bytes).Bf16Planes(values);
  for (size_t i = 0; i < values.size(); ++i) {
    const auto high = static_cast<uint8_t>(bytes[i]);
    const auto low = static_cast<uint8_t>(bytes[values.size() + i]);
    ASSERT_EQ(high << 8 | low, FloatToBf16(values[i])) << values[i];
  }
}

// All fields differ from a new span's: none may stay when the next record is decoded.
TEST(TraceFormat, WhatASpanHeldBeforeIsGone) {
  RoutingSpan used = RandomSpan(3, {}, false);
  used.top_k = 3;
  used.hidden_width = 7;
  used.attention_heads = 2;
  used.topk_ids.assign(5, 1);
  used.topk_probs.assign(5, .5f);
  used.hidden.assign(9, 1);
  used.output.assign(9, 1);
  used.attention_entropy.assign(4, 1);
  used.attention_keys.assign(4, 1);
  RoutingSpan span;
  span.num_tokens = 2;
  span.num_layers = 1;
  span.expert_ids = {1, 0};
  DecodeSpan(Key(), EncodeSpan(Key(), span, Task::kGenerate, 2), "test", nullptr, &used);
  EXPECT_EQ(used, span);
}

TEST(TraceFormat, AbsentPlanesStayAbsent) {
  RoutingSpan span;
  span.num_tokens = 2;
  span.num_layers = 1;
  span.token_ids = {70000, 3};  // beyond 16 bits
  span.expert_ids = {1, 0};
  const auto back =
      DecodeSpan(Key(), EncodeSpan(Key(), span, Task::kGenerate, 2), "test");
  EXPECT_EQ(back.span, span);
}

TEST(TraceFormat, TokenIdsMayBeUnknown) {
  RoutingSpan span = RandomSpan(5, {}, false);
  span.token_ids.clear();
  const std::string value = EncodeSpan(Key(), span, Task::kGenerate, 128);
  EXPECT_EQ(DecodeSpan(Key(), value, "test").span, span);
}

TEST(TraceFormat, ProbabilitiesOfTheTopKMayBeUnknown) {
  RoutingSpan span = RandomSpan(5, {}, false);
  span.topk_probs.clear();
  const std::string value = EncodeSpan(Key(), span, Task::kGenerate, 128);
  EXPECT_EQ(DecodeSpan(Key(), value, "test").span, span);
}

template <typename Decode>
void ExpectEveryFlipIsSeen(const std::string& value, const Decode& decode) {
  for (size_t i = 0; i < value.size(); ++i) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string damaged = value;
      damaged[i] = static_cast<char>(damaged[i] ^ (1 << bit));
      ASSERT_THROW(decode(damaged), DataError) << "byte " << i << " bit " << bit;
    }
  }
  for (size_t cut = 0; cut < value.size(); ++cut) {
    ASSERT_THROW(decode(value.substr(0, cut)), DataError) << "cut at " << cut;
  }
}

TEST(TraceFormat, EveryFlippedBitOfASpanIsSeen) {
  TraceShape shape;
  shape.max_tokens = 3;
  const RoutingSpan span = RandomSpan(5, shape, false);
  ExpectEveryFlipIsSeen(EncodeSpan(Key(), span, Task::kDenoise, 128),
                        [](const std::string& v) { DecodeSpan(Key(), v, "test"); });
}

TEST(TraceFormat, EveryFlippedBitOfHiddenIsSeen) {
  TraceShape shape;
  shape.max_tokens = 2;
  const RoutingSpan span = RandomSpan(5, shape, true);
  ExpectEveryFlipIsSeen(EncodeHidden(Key(), span), [&](const std::string& v) {
    RoutingSpan target = span;
    DecodeHidden(Key(), v, "test", &target);
  });
}

TEST(TraceFormat, EveryFlippedBitOfAMarkIsSeen) {
  const ChunkMark mark{3, {{1, 2, 3, 4, 5, true}, {9, 2, 3, 4, 0, false}}};
  const std::string value = EncodeMark(Key(), mark);
  EXPECT_EQ(DecodeMark(Key(), value, "test").sequences, mark.sequences);
  ExpectEveryFlipIsSeen(value,
                        [](const std::string& v) { DecodeMark(Key(), v, "test"); });
}

TEST(TraceFormat, ARecordUnderAnotherKeyIsSeen) {
  const RoutingSpan span = RandomSpan(5, {}, false);
  const std::string value = EncodeSpan(Key(), span, Task::kDenoise, 128);
  EXPECT_THROW(DecodeSpan(EncodeKey(RecordKind::kEncoder, 8), value, "test"), DataError);
}

// A hostile record may carry a right checksum: dims that promise terabytes must not be
// believed.
TEST(TraceFormat, HugeDimsAreRefusedBeforeMemoryIsTaken) {
  std::string value;
  ByteWriter out(&value);
  out.U8(kRecordVersion);
  out.U8(2);
  out.U8(0);
  out.Varint(kMaxTokens);
  out.Varint(kMaxLayers);
  out.Varint(2);
  out.Varint(kMaxTopK);
  const std::string key = Key();
  out.U64(Hash64(value, Hash64(key)));
  EXPECT_THROW(DecodeSpan(key, value, "test"), DataError);
}

}  // namespace
}  // namespace routecast
