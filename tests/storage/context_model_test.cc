#include "storage/context_model.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "common/errors.h"
#include "common/files.h"
#include "storage/byte_codec.h"
#include "storage/context_trainer.h"
#include "storage/range_coder.h"
#include "tests/storage/random_trace.h"
#include "tests/support/mutation.h"

namespace routecast {
namespace {

constexpr int kExperts = 32, kLayers = 3;
const std::string kKey = EncodeKey(RecordKind::kDecoder, 7);

// Routing as models have it: an expert follows the token and the expert before, mostly.
RoutingSpan LikelySpan(uint64_t key, bool tokens, int length = 60) {
  RoutingSpan s;
  s.num_tokens = length;
  s.num_layers = kLayers;
  std::vector<uint32_t> ids;
  for (int t = 0; t < length; ++t) {
    ids.push_back(
        static_cast<uint32_t>(ToRange(Mix(key, 1, t), 12) * ToRange(Mix(key, 2, t), 5)));
  }
  for (int l = 0; l < kLayers; ++l) {
    for (int t = 0; t < length; ++t) {
      const uint64_t before =
          l == 0 ? 0 : s.expert_ids[static_cast<size_t>(l - 1) * length + t];
      const uint64_t draw = Mix(key, 3, l, t);
      const uint64_t usual = ToRange(Mix(4, ids[t], before, draw % 2), kExperts);
      s.expert_ids.push_back(
          static_cast<uint16_t>(draw % 11 == 0 ? ToRange(Mix(draw), kExperts) : usual));
    }
  }
  if (tokens) s.token_ids = std::move(ids);
  return s;
}

ContextModel LikelyModel(bool tokens, ContextKind kind = ContextKind::kTokens) {
  ContextTrainer trainer({0, kLayers, kExperts, 1, 0}, {.kind = kind});
  for (uint64_t i = 0; i < 300; ++i) {
    trainer.Add(Stack::kDecoder, LikelySpan(i, tokens));
  }
  return trainer.Train("test");
}

size_t PackedSize(const RoutingSpan& span) {
  return EncodeSpan(kKey, span, Task::kGenerate, kExperts).size();
}

TEST(RangeCoder, IntervalsComeBack) {
  for (uint64_t seed = 0; seed < 300; ++seed) {
    struct Interval {
      uint32_t start, size, total;
    };
    std::vector<Interval> intervals;
    for (uint64_t i = 0; i < seed; ++i) {
      const auto total =
          static_cast<uint32_t>(1 + ToRange(Mix(seed, i, 1), 1u << (i % 32)));
      const auto start = static_cast<uint32_t>(ToRange(Mix(seed, i, 2), total));
      // The last interval of a total is where carries come from.
      const uint32_t size =
          Mix(seed, i, 3) % 3 == 0
              ? total - start
              : static_cast<uint32_t>(1 + ToRange(Mix(seed, i, 4), total - start));
      intervals.push_back({start, size, total});
    }
    std::string bytes = "before";
    RangeEncoder encoder(&bytes);
    for (const Interval& i : intervals) encoder.Encode(i.start, i.size, i.total);
    encoder.Finish();
    RangeDecoder decoder(std::string_view(bytes).substr(6));
    for (const Interval& i : intervals) {
      const uint32_t at = decoder.Peek(i.total);
      ASSERT_GE(at, i.start);
      ASSERT_LT(at - i.start, i.size);
      decoder.Take(i.start, i.size);
    }
    EXPECT_LE(bytes.size() - 6, decoder.read());
  }
}

TEST(ContextModel, IdsComeBackWhateverTheyAre) {
  for (const int experts : {1, 2, 3, 128, kMaxCodedExperts}) {
    for (const bool tokens : {true, false}) {
      TraceShape shape;
      shape.num_experts = experts;
      ContextTrainer trainer({shape.layers, shape.layers, experts, 1, 0}, {});
      std::vector<RoutingSpan> spans;
      for (uint64_t id = 0; id < 30; ++id) {
        spans.push_back(RandomSpan(Mix(id, experts), shape, false));
        if (!tokens) spans.back().token_ids.clear();
        if (id % 2 == 0) trainer.Add(Stack::kDecoder, spans.back());
      }
      const ContextModel model = trainer.Train("test");
      for (const RoutingSpan& span : spans) {
        std::string coded;
        model.EncodeIds(Stack::kDecoder, span, &coded);
        RoutingSpan back = span;
        back.expert_ids.clear();
        ASSERT_TRUE(model.DecodeIds(Stack::kDecoder, coded, &back));
        ASSERT_EQ(back, span) << experts;
      }
    }
  }
}

TEST(ContextModel, WhatIsLikelyTakesLittle) {
  for (const bool tokens : {true, false}) {
    for (const auto kind : {ContextKind::kTokens, ContextKind::kPair}) {
      const ContextModel model = LikelyModel(tokens, kind);
      size_t coded = 0, packed = 0;
      for (uint64_t i = 1000; i < 1020; ++i) {
        const RoutingSpan span = LikelySpan(i, tokens);
        const std::string value =
            EncodeSpan(kKey, span, Task::kGenerate, kExperts, &model);
        ASSERT_EQ(DecodeSpan(kKey, value, "test", &model).span, span);
        const size_t token_bytes = 2 * span.token_ids.size();
        coded += value.size() - token_bytes;
        packed += PackedSize(span) - token_bytes;
      }
      EXPECT_LT(coded, packed * (tokens ? 70 : 95) / 100) << tokens;
    }
  }
}

TEST(ContextModel, BitsAreWhatCodingTakes) {
  const ContextModel model = LikelyModel(true);
  std::vector<double> bits(kLayers);
  const RoutingSpan span = LikelySpan(2000, true, 5000);
  model.CountBits(Stack::kDecoder, span, &bits);
  std::string coded;
  model.EncodeIds(Stack::kDecoder, span, &coded);
  EXPECT_NEAR((bits[0] + bits[1] + bits[2]) / 8, static_cast<double>(coded.size()), 8);
}

TEST(ContextModel, UnlikelyIdsStayPacked) {
  const ContextModel model = LikelyModel(true);
  RoutingSpan span = LikelySpan(5, true);
  for (size_t i = 0; i < span.expert_ids.size(); ++i) {
    span.expert_ids[i] = static_cast<uint16_t>(ToRange(Mix(9, i), kExperts));
  }
  const std::string value = EncodeSpan(kKey, span, Task::kGenerate, kExperts, &model);
  EXPECT_EQ(value.size(), PackedSize(span));
  EXPECT_EQ(DecodeSpan(kKey, value, "test").span, span);
}

TEST(ContextModel, TheFileGivesTheSameModel) {
  const ContextModel model = LikelyModel(true);
  const ContextModel back = ContextModel::Parse(model.Serialize(), "test");
  EXPECT_EQ(back.fingerprint(), model.fingerprint());
  const RoutingSpan span = LikelySpan(77, true);
  EXPECT_EQ(EncodeSpan(kKey, span, Task::kGenerate, kExperts, &back),
            EncodeSpan(kKey, span, Task::kGenerate, kExperts, &model));
}

TEST(ContextModel, EveryFlippedOrCutByteOfItsFileIsSeen) {
  ContextTrainer trainer({0, kLayers, 4, 1, 0}, {});
  const std::string file = trainer.Train("test").Serialize();
  for (size_t i = 0; i < file.size(); ++i) {
    std::string damaged = file;
    damaged[i] = static_cast<char>(damaged[i] ^ (1 << i % 8));
    ASSERT_THROW(ContextModel::Parse(damaged, "test"), DataError) << i;
    ASSERT_THROW(ContextModel::Parse(file.substr(0, i), "test"), DataError) << i;
  }
}

// The checksum holds, and the bytes under it are anybody's.
TEST(ContextModel, HostileFilesAreModelsOrRefused) {
  ContextTrainer trainer({0, kLayers, kExperts, 1, 0}, {});
  for (uint64_t i = 0; i < 20; ++i) trainer.Add(Stack::kDecoder, LikelySpan(i, true));
  const std::string file = trainer.Train("test").Serialize();
  const std::string body = file.substr(0, file.size() - 8);
  int refused = 0;
  for (uint64_t seed = 0; seed < 1500; ++seed) {
    std::string bytes = Mutate(body, seed, {3, 8, {"\xFF", std::string(1, '\0')}});
    ByteWriter(&bytes).U64(Hash64(bytes));
    try {
      const ContextModel model = ContextModel::Parse(bytes, "test");
      EXPECT_LE(model.num_experts(), kMaxCodedExperts);
    } catch (const DataError& e) {
      ++refused;
      ASSERT_LE(std::count(e.what(), e.what() + std::strlen(e.what()), '\n'), 2);
    }
  }
  EXPECT_GT(refused, 1000);
}

TEST(ContextModel, HostileRecordsAreRecordsOrRefused) {
  const ContextModel model = LikelyModel(true);
  const std::string value =
      EncodeSpan(kKey, LikelySpan(3, true), Task::kGenerate, kExperts, &model);
  const std::string body = value.substr(0, value.size() - kChecksumBytes);
  int read = 0, refused = 0;
  for (uint64_t seed = 0; seed < 20000; ++seed) {
    std::string bytes = Mutate(body, seed, {3, 8, {"\xFF", std::string(1, '\0')}});
    const bool coded = bytes.size() > 1 && (bytes[1] & 0x80);
    const uint64_t sum = Hash64(bytes, Hash64(kKey) + (coded ? model.fingerprint() : 0));
    ByteWriter(&bytes).U64(sum);
    try {
      const RoutingSpan span = DecodeSpan(kKey, bytes, "test", &model).span;
      ++read;
      for (const uint16_t id : span.expert_ids) ASSERT_LT(id, kExperts);
    } catch (const DataError&) {
      ++refused;
    }
  }
  EXPECT_GT(read, 100);
  EXPECT_GT(refused, 100);
}

TEST(ContextModel, EveryFlippedOrCutByteOfARecordIsSeen) {
  const ContextModel model = LikelyModel(true);
  const std::string value =
      EncodeSpan(kKey, LikelySpan(3, true), Task::kGenerate, kExperts, &model);
  for (size_t i = 0; i < value.size(); ++i) {
    std::string damaged = value;
    damaged[i] = static_cast<char>(damaged[i] ^ (1 << i % 8));
    ASSERT_THROW(DecodeSpan(kKey, damaged, "test", &model), DataError) << i;
    ASSERT_THROW(DecodeSpan(kKey, value.substr(0, i), "test", &model), DataError) << i;
  }
}

TEST(ContextModel, ARecordNeedsItsOwnModel) {
  const ContextModel model = LikelyModel(true);
  const ContextModel other = LikelyModel(true, ContextKind::kPair);
  const std::string value =
      EncodeSpan(kKey, LikelySpan(3, true), Task::kGenerate, kExperts, &model);
  EXPECT_THROW(DecodeSpan(kKey, value, "test"), DataError);
  EXPECT_THROW(DecodeSpan(kKey, value, "test", &other), DataError);
}

// Without token ids nothing else bounds what a coded plane claims.
TEST(ContextModel, ManyIdsOfFewBytesAreRefusedBeforeMemoryIsTaken) {
  const ContextModel model = LikelyModel(false);
  std::string value;
  ByteWriter out(&value);
  out.U8(kRecordVersion);
  out.U8(128 | 32);  // coded ids, no token ids
  out.U8(0);
  out.Varint(kMaxTokens);
  out.Varint(kLayers);
  out.Varint(kExperts);
  out.Varint(0);
  out.Varint(3);
  out.Raw("abc", 3);
  const uint64_t sum = Hash64(value, Hash64(kKey) + model.fingerprint());
  out.U64(sum);
  EXPECT_THROW(DecodeSpan(kKey, value, "test", &model), DataError);
}

}  // namespace
}  // namespace routecast
