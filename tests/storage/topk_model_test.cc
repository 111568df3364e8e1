// Coded top-k ids: what is drawn comes back, from records and files that may be hostile.
#include "storage/topk_model.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "common/errors.h"
#include "common/files.h"
#include "storage/byte_codec.h"
#include "storage/context_model.h"
#include "storage/range_coder.h"
#include "storage/topk_trainer.h"
#include "tests/storage/random_trace.h"
#include "tests/support/mutation.h"

namespace routecast {
namespace {

constexpr int kExperts = 16, kLayers = 2, kTopK = 4;
const std::string kKey = EncodeKey(RecordKind::kDecoder, 7);
const MoeGeometry kGeometry = {0, kLayers, kExperts, 1, 0};

// Few token ids and a few usual sets for each: what follows is mostly foreseeable.
RoutingSpan LikelySpan(uint64_t key, bool tokens) {
  RoutingSpan s;
  s.num_tokens = 60;
  s.num_layers = kLayers;
  s.top_k = kTopK;
  std::vector<uint32_t> ids;
  for (int t = 0; t < s.num_tokens; ++t) {
    ids.push_back(static_cast<uint32_t>(ToRange(Mix(key, 1, t), 12)));
  }
  for (int l = 0; l < kLayers; ++l) {
    for (int t = 0; t < s.num_tokens; ++t) {
      const uint64_t usual = Mix(2, l, ids[static_cast<size_t>(t)]);
      const uint64_t draw = Mix(key, 3, l, t);
      std::vector<uint16_t> drawn;
      for (uint64_t i = 0; drawn.size() < kTopK; ++i) {
        const uint64_t from = Mix(draw, i) % 7 == 0 ? draw : usual;
        const auto e = static_cast<uint16_t>(ToRange(Mix(from, i), kExperts));
        if (std::find(drawn.begin(), drawn.end(), e) == drawn.end()) drawn.push_back(e);
      }
      s.expert_ids.push_back(drawn[0]);
      s.topk_ids.insert(s.topk_ids.end(), drawn.begin(), drawn.end());
    }
  }
  if (tokens) s.token_ids = std::move(ids);
  return s;
}

ContextModel LikelyModel(bool tokens) {
  ContextTrainer trainer(kGeometry, {});
  TopkTrainer topk(kGeometry, {});
  for (uint64_t i = 0; i < 200; ++i) {
    const RoutingSpan span = LikelySpan(i, tokens);
    trainer.Add(Stack::kDecoder, span);
    topk.Add(Stack::kDecoder, span);
  }
  ContextModel model = trainer.Train("test");
  model.Attach(topk.Train("test"));
  return model;
}

std::string Encode(const RoutingSpan& span, const ContextModel* model) {
  return EncodeSpan(kKey, span, Task::kGenerate, kExperts, model);
}

TEST(TopkModel, IdsComeBackWhateverTheyAre) {
  for (const auto& [experts, k] : std::vector<std::pair<int, int>>{
           {1, 1}, {2, 2}, {3, 2}, {16, 16}, {50, 4}, {128, 8}, {kMaxCodedExperts, 16}}) {
    for (const bool tokens : {true, false}) {
      const TraceShape shape = {
          .num_experts = experts, .top_k = k, .max_tokens = 20, .distinct = true};
      TopkTrainer trainer({0, shape.layers, experts, 1, 0}, {});
      std::vector<RoutingSpan> spans;
      for (uint64_t id = 0; id < 20; ++id) {
        spans.push_back(RandomSpan(Mix(id, experts), shape, false));
        if (!tokens) spans.back().token_ids.clear();
        if (id % 2 == 0) trainer.Add(Stack::kDecoder, spans.back());
      }
      const TopkModel model = trainer.Train("test");
      for (const RoutingSpan& span : spans) {
        std::string coded;
        ASSERT_TRUE(model.EncodeIds(Stack::kDecoder, span, &coded)) << experts;
        RoutingSpan back = span;
        back.topk_ids.clear();
        ASSERT_TRUE(model.DecodeIds(Stack::kDecoder, coded, &back)) << experts;
        ASSERT_EQ(back, span) << experts;
      }
    }
  }
}

TEST(TopkModel, WhatIsLikelyTakesLittle) {
  for (const bool tokens : {true, false}) {
    const ContextModel model = LikelyModel(tokens);
    size_t coded = 0, packed = 0;
    for (uint64_t i = 1000; i < 1020; ++i) {
      const RoutingSpan span = LikelySpan(i, tokens);
      RoutingSpan first = span;
      first.top_k = 0;
      first.topk_ids.clear();
      const std::string value = Encode(span, &model);
      ASSERT_EQ(DecodeSpan(kKey, value, "test", &model).span, span);
      EXPECT_EQ(value[0], kCodedTopkVersion);
      coded += value.size() - Encode(first, &model).size();
      packed += PackedBytes(span.topk_ids.size(), 4);
    }
    EXPECT_LT(coded, packed * (tokens ? 40 : 65) / 100) << tokens;
  }
}

// Equal probabilities: the first of the top-k may be another than the router's choice.
TEST(TopkModel, TheFirstMayBeAnotherThanTheChoice) {
  const ContextModel model = LikelyModel(true);
  RoutingSpan span = LikelySpan(5, true);
  for (const size_t i : {size_t{0}, size_t{7}, span.expert_ids.size() - 1}) {
    span.expert_ids[i] = span.topk_ids[i * kTopK + 1];
  }
  const std::string value = Encode(span, &model);
  EXPECT_EQ(value[0], kCodedTopkVersion);
  EXPECT_EQ(DecodeSpan(kKey, value, "test", &model).span, span);
}

TEST(TopkModel, WhatIsNotDistinctStaysPacked) {
  const ContextModel model = LikelyModel(true);
  RoutingSpan span = LikelySpan(5, true);
  span.topk_ids[2] = span.topk_ids[1];
  const std::string value = Encode(span, &model);
  EXPECT_EQ(value[0], kRecordVersion);
  EXPECT_EQ(DecodeSpan(kKey, value, "test", &model).span, span);
}

// As of stores that were coded before top-k ids were.
TEST(TopkModel, AModelWithoutItLeavesThemPacked) {
  ContextTrainer trainer(kGeometry, {});
  for (uint64_t i = 0; i < 200; ++i) trainer.Add(Stack::kDecoder, LikelySpan(i, true));
  const ContextModel model =
      ContextModel::Parse(trainer.Train("test").Serialize(), "test");
  EXPECT_EQ(model.topk(), nullptr);
  const RoutingSpan span = LikelySpan(300, true);
  const std::string value = Encode(span, &model);
  EXPECT_EQ(value[0], kRecordVersion);
  EXPECT_EQ(DecodeSpan(kKey, value, "test", &model).span, span);
}

// The coded plane by an encoder that only follows docs/trace_format.md.
TEST(TopkModel, CodesAsTheFormatSays) {
  const ContextModel model = LikelyModel(true);
  const StackTables& tables = model.topk()->tables(Stack::kDecoder);
  for (uint64_t seed = 400; seed < 410; ++seed) {
    const RoutingSpan span = LikelySpan(seed, true);
    std::string slow(1, '\0');  // no exceptions
    RangeEncoder coder(&slow);
    for (size_t l = 0; l < kLayers; ++l) {
      for (size_t t = 0; t < size_t(span.num_tokens); ++t) {
        const uint16_t* ids =
            &span.topk_ids[(l * static_cast<size_t>(span.num_tokens) + t) * kTopK];
        std::vector<uint32_t> weights =
            BaseWeights(tables.marginal[l], tables.previous[l][ids[0]]);
        const Row *alone = nullptr, *pair = nullptr;
        for (const auto& context : tables.contexts) {
          if (context.inner != span.token_ids[t]) continue;
          if (context.outer == kAnyContext) alone = &context.rows[l];
          const uint32_t before = t > 0 ? span.token_ids[t - 1] : kNoContext;
          if (context.outer == before) pair = &context.rows[l];
        }
        const Row row = pair && alone ? Compose(*alone, *pair)
                        : pair        ? *pair
                        : alone       ? *alone
                                      : Row();
        for (const RowEntry& e : row) {
          weights[e.expert] = std::max<uint32_t>(
              1, uint32_t(uint64_t{weights[e.expert]} * FactorTimes(e.factor) >> 16));
        }
        for (int r = 0; r < kTopK; ++r) {
          uint32_t start = 0, total = 0;
          for (size_t e = 0; e < weights.size(); ++e) {
            if (e < ids[r]) start += weights[e];
            total += weights[e];
          }
          if (r > 0) coder.Encode(start, weights[ids[r]], total);
          weights[ids[r]] = 0;
        }
      }
    }
    coder.Finish();
    std::string coded;
    ASSERT_TRUE(model.topk()->EncodeIds(Stack::kDecoder, span, &coded));
    EXPECT_TRUE(coded == slow) << seed;
  }
}

TEST(TopkModel, TheFileGivesTheSameModel) {
  const ContextModel model = LikelyModel(true);
  const ContextModel back = ContextModel::Parse(model.Serialize(), "test");
  EXPECT_EQ(back.fingerprint(), model.fingerprint());
  ASSERT_NE(back.topk(), nullptr);
  const RoutingSpan span = LikelySpan(77, true);
  EXPECT_EQ(Encode(span, &back), Encode(span, &model));
}

TEST(TopkModel, HostileFilesAreModelsOrRefused) {
  const std::string file = LikelyModel(true).Serialize();
  const std::string body = file.substr(0, file.size() - 8);
  int refused = 0;
  for (uint64_t seed = 0; seed < 500; ++seed) {
    std::string bytes = Mutate(body, seed, {3, 8, {"\xFF", std::string(1, '\0')}});
    ByteWriter(&bytes).U64(Hash64(bytes));
    try {
      ContextModel::Parse(bytes, "test");
    } catch (const DataError&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, 300);
}

// The checksum holds, and the bytes under it are anybody's: what is read is distinct.
TEST(TopkModel, HostileRecordsAreRecordsOrRefused) {
  const ContextModel model = LikelyModel(true);
  const std::string value = Encode(LikelySpan(3, true), &model);
  const std::string body = value.substr(0, value.size() - kChecksumBytes);
  int read = 0, refused = 0;
  for (uint64_t seed = 0; seed < 20000; ++seed) {
    std::string bytes = Mutate(body, seed, {3, 8, {"\xFF", std::string(1, '\0')}});
    const bool coded = bytes.size() > 1 && ((bytes[1] & 0x80) || bytes[0] == 2);
    const uint64_t sum = Hash64(bytes, Hash64(kKey) + (coded ? model.fingerprint() : 0));
    ByteWriter(&bytes).U64(sum);
    try {
      const RoutingSpan span = DecodeSpan(kKey, bytes, "test", &model).span;
      ++read;
      for (const uint16_t id : span.topk_ids) ASSERT_LT(id, kExperts);
    } catch (const DataError&) {
      ++refused;
    }
  }
  EXPECT_GT(read, 100);
  EXPECT_GT(refused, 100);
}

TEST(TopkModel, EveryFlippedOrCutByteOfARecordIsSeen) {
  const ContextModel model = LikelyModel(true);
  const std::string value = Encode(LikelySpan(3, true), &model);
  for (size_t i = 0; i < value.size(); ++i) {
    std::string damaged = value;
    damaged[i] = static_cast<char>(damaged[i] ^ (1 << i % 8));
    ASSERT_THROW(DecodeSpan(kKey, damaged, "test", &model), DataError) << i;
    ASSERT_THROW(DecodeSpan(kKey, value.substr(0, i), "test", &model), DataError) << i;
  }
  EXPECT_THROW(DecodeSpan(kKey, value, "test"), DataError);
}

// K multiplies what a plane claims.
TEST(TopkModel, ManyIdsOfFewBytesAreRefusedBeforeMemoryIsTaken) {
  const ContextModel model = LikelyModel(false);
  std::string value;
  ByteWriter out(&value);
  out.U8(kCodedTopkVersion);
  out.U8(128 | 64 | 32);  // coded ids, top-k ids alone, no token ids
  out.U8(0);
  constexpr uint64_t kTokens = 1 << 20;
  out.Varint(kTokens);
  out.Varint(kLayers);
  out.Varint(kExperts);
  out.Varint(kExperts);
  const std::string ids(kTokens * kLayers / kMaxIdsPerByte, '\x55');
  out.Varint(ids.size());
  out.Raw(ids.data(), ids.size());
  out.Varint(3);
  out.Raw("abc", 3);
  out.U64(Hash64(value, Hash64(kKey) + model.fingerprint()));
  try {
    DecodeSpan(kKey, value, "test", &model);
    ADD_FAILURE() << "it was read";
  } catch (const DataError& e) {
    EXPECT_NE(std::string(e.what()).find("too few bytes of coded top-k"),
              std::string::npos)
        << e.what();
  }
}

}  // namespace
}  // namespace routecast
