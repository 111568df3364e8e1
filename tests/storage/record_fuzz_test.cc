// What lies in a store besides tables' bytes, changed at random under a checksum that
// holds: it is read within its bounds, or refused as bad data. (Router inputs and
// attention: attention_store_test; coded ids: context_model_test.)
#include <gtest/gtest.h>

#include "common/errors.h"
#include "common/run_record.h"
#include "storage/byte_codec.h"
#include "storage/shard_seal.h"
#include "tests/storage/store_fixture.h"
#include "tests/support/mutation.h"

namespace routecast {
namespace {

constexpr uint64_t kSeeds = 5000;

std::string MutateBytes(const std::string& bytes, uint64_t seed) {
  return Mutate(bytes, seed, {3, 8, {"\xFF", std::string(1, '\0'), "\x80\x80"}});
}

// `read` gets values whose bodies are changed and whose checksums are right.
template <typename Read>
void ReadHostileRecords(const std::string& key, const std::string& value, Read read) {
  const std::string body = value.substr(0, value.size() - kChecksumBytes);
  uint64_t taken = 0, refused = 0;
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    SCOPED_TRACE(seed);
    std::string bytes = MutateBytes(body, seed);
    ByteWriter(&bytes).U64(Hash64(bytes, Hash64(key)));
    try {
      read(bytes);
      ++taken;
    } catch (const DataError&) {
      ++refused;
    }
  }
  EXPECT_GT(taken, kSeeds / 100);
  EXPECT_GT(refused, kSeeds / 100);
}

TEST(RecordFuzz, Spans) {
  const std::string key = EncodeKey(RecordKind::kDecoder, 7);
  TraceShape shape;
  shape.min_tokens = shape.max_tokens = 9;
  shape.num_experts = 100;  // so that seven bits can say too much
  const RoutingSpan span = RandomSpan(5, shape, false);
  ReadHostileRecords(
      key, EncodeSpan(key, span, Task::kDenoise, 100), [&](const std::string& bytes) {
        const DecodedSpan d = DecodeSpan(key, bytes, "test");
        const size_t n = static_cast<size_t>(d.span.num_tokens) *
                         static_cast<size_t>(d.span.num_layers);
        ASSERT_EQ(d.span.expert_ids.size(), n);
        ASSERT_EQ(d.span.topk_ids.size(), n * static_cast<size_t>(d.span.top_k));
        for (const uint16_t id : d.span.expert_ids) ASSERT_LT(id, d.num_experts);
        for (const uint16_t id : d.span.topk_ids) ASSERT_LT(id, d.num_experts);
      });
}

TEST(RecordFuzz, Marks) {
  const std::string key = EncodeKey(RecordKind::kChunkMark, 3);
  const ChunkMark mark{
      3, {{1, 2, 3, 4, 5, true}, {9, 2, 3, 4, 0, false}, {700, 3, 4, 300, 300, true}}};
  ReadHostileRecords(key, EncodeMark(key, mark), [&](const std::string& bytes) {
    const ChunkMark back = DecodeMark(key, bytes, "test");
    ASSERT_LE(back.sequences.size(), bytes.size());
    for (size_t i = 1; i < back.sequences.size(); ++i) {
      ASSERT_LT(back.sequences[i - 1].sequence_id, back.sequences[i].sequence_id);
    }
  });
}

TEST(RecordFuzz, CoderMarks) {
  const std::string key = EncodeKey(RecordKind::kCoderMark, 0);
  ReadHostileRecords(
      key, EncodeCoderMark(key, {0x1234567890abcdefULL, 300}),
      [&](const std::string& bytes) { DecodeCoderMark(key, bytes, "test"); });
}

class StoreFileFuzz : public TraceStoreTest {};

// store.json has no checksum of its own: whatever it says is a configuration, another
// schema, or bad data.
TEST_F(StoreFileFuzz, Configurations) {
  StoreConfig config = config_;
  config.intakes = {{{"text:a"}, "00", 2, 0},
                    {{"text:b"}, config.corpus_fingerprint, kChunks - 2, 5}};
  const std::string good = config.ToJson().dump();
  uint64_t taken = 0, refused = 0;
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    SCOPED_TRACE(seed);
    const std::string text = Mutate(
        good, seed, {2, 8, {"-1", "[]", "{}", "\"", "null", "1e999", "9999999999"}});
    try {
      const StoreConfig c = StoreConfig::FromJson(ParseJson(text, "test"), "test");
      ASSERT_GE(c.num_shards, 1);
      ASSERT_GE(c.geometry.num_experts, 1);
      ++taken;
    } catch (const DataError&) {
      ++refused;
    } catch (const UsageError&) {
      ++refused;
    }
  }
  EXPECT_GT(taken, kSeeds / 100);
  EXPECT_GT(refused, kSeeds / 100);
}

TEST_F(StoreFileFuzz, Seals) {
  Fill();
  WriteShardSeal(store(), 0, {{0, "mark"}, {4, "another"}}, std::nullopt);
  const fs::path path = store() / "shards" / "00000.seal";
  std::string good = ReadFile(path);
  good.resize(good.rfind('\n', good.size() - 2));  // without the line of its checksum
  uint64_t taken = 0, refused = 0;
  for (uint64_t seed = 0; seed < 1000; ++seed) {
    SCOPED_TRACE(seed);
    const std::string text = Mutate(
        good, seed, {2, 8, {"-1", "[]", "{}", "\"", "null", "\"x\"", "99999999999"}});
    WriteFileAtomic(path, text + "\n" + Hex64(Hash64(text)) + "\n");
    try {
      ReadShardSeal(store(), 0);
      ++taken;
    } catch (const DataError&) {
      ++refused;
    }
  }
  EXPECT_GT(taken, 10u);
  EXPECT_GT(refused, 10u);
}

}  // namespace
}  // namespace routecast
