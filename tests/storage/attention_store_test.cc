// Attention summaries from a chunk to a reader, an export and back; what is wrong with
// them is found.
#include <gtest/gtest.h>

#include "common/errors.h"
#include "common/files.h"
#include "storage/byte_codec.h"
#include "storage/export.h"
#include "storage/import.h"
#include "storage/merge.h"
#include "storage/npy.h"
#include "storage/salvage.h"
#include "storage/shard_db.h"
#include "storage/trace_format.h"
#include "storage/trace_reader.h"
#include "storage/verify.h"
#include "tests/storage/random_trace.h"
#include "tests/storage/temp_folder.h"
#include "tests/support/mutation.h"

namespace routecast {
namespace {

constexpr int kHeads = 3;
constexpr uint32_t kStoreChunks = 2;
constexpr uint64_t kSequences = 6;  // a chunk

class AttentionStore : public testing::Test {
 protected:
  AttentionStore() { config_.record.push_back("output"); }
  fs::path store() const { return folder_.path() / "store"; }
  void Write() {
    TraceStore::CreateOrOpen(store(), config_);
    ShardOwner owner(store(), config_, 0, 1);
    for (uint32_t c = 0; c < kStoreChunks; ++c) {
      StageChunk(store(), config_, c, kSequences, shape_, "t");
      owner.Ingest(c, "t");
    }
    owner.Finish();
  }
  void ExpectAll(const fs::path& store) {
    const TraceReader reader(store);
    EXPECT_EQ(reader.config().attention_heads, kHeads);
    EXPECT_EQ(reader.sequences().size(), kStoreChunks * kSequences);
    int attended = 0;
    reader.Scan(
        [&](RoutingTrace&& trace) {
          EXPECT_EQ(trace, RandomTrace(trace.sequence_id, shape_));
          attended += trace.encoder.attention_heads > 0;
        },
        WithHidden::kAttended);
    EXPECT_GT(attended, 0);
    EXPECT_LT(attended, static_cast<int>(reader.sequences().size()));
    EXPECT_TRUE(VerifyStore(store).sound());
  }
  TempFolder folder_;
  TraceShape shape_ = {
      .num_experts = 16, .layers = 2, .width = 4, .max_tokens = 9, .heads = kHeads};
  StoreConfig config_ = ConfigOf(shape_, 2, kStoreChunks);
};

TEST_F(AttentionStore, GivesBackWhatWasWritten) {
  Write();
  ExpectAll(store());
}

TEST_F(AttentionStore, RouterInputsAreReadWithoutIt) {
  Write();
  const TraceReader reader(store());
  const auto without = [](RoutingTrace trace) {
    for (RoutingSpan* span : {&trace.encoder, &trace.decoder}) {
      span->attention_heads = 0;
      span->attention_entropy.clear();
      span->attention_keys.clear();
    }
    return trace;
  };
  for (const uint64_t id : reader.sequence_ids()) {
    const RoutingTrace whole = RandomTrace(id, shape_);
    EXPECT_EQ(reader.Read(id, WithHidden::kAttended), whole);
    EXPECT_EQ(reader.Read(id, WithHidden::kYes), without(whole));
  }
  reader.Scan(
      [&](RoutingTrace&& t) {
        EXPECT_EQ(t, without(RandomTrace(t.sequence_id, shape_)));
      },
      WithHidden::kYes);
}

TEST_F(AttentionStore, LiesInAColumnFamilyOfItsOwn) {
  Write();
  const auto records = [&](Family family) {
    std::vector<std::string> keys;
    for (int shard = 0; shard < config_.num_shards; ++shard) {
      const ShardDb db(store(), shard, config_, ShardDb::Mode::kRead);
      const std::unique_ptr<rocksdb::Iterator> it(
          db.db()->NewIterator(rocksdb::ReadOptions(), db.family(family)));
      for (it->SeekToFirst(); it->Valid(); it->Next()) {
        EXPECT_THROW(
            DecodeSpan(it->key().ToStringView(), it->value().ToStringView(), "test"),
            DataError);
        keys.push_back(it->key().ToString());
      }
    }
    return keys;
  };
  const std::vector<std::string> attended = records(Family::kAttention);
  EXPECT_FALSE(attended.empty());
  EXPECT_EQ(attended, records(Family::kHidden));
}

// A chunk's mark names its records; one that is not there is found.
TEST_F(AttentionStore, AMissingRecordIsFoundByVerify) {
  Write();
  for (int shard = 0; shard < config_.num_shards; ++shard) {
    RemoveShardSeal(store(), shard);
    const ShardDb db(store(), shard, config_, ShardDb::Mode::kWrite);
    const std::unique_ptr<rocksdb::Iterator> it(
        db.db()->NewIterator(rocksdb::ReadOptions(), db.family(Family::kAttention)));
    it->SeekToFirst();
    if (!it->Valid()) continue;
    ASSERT_TRUE(
        db.db()
            ->Delete(rocksdb::WriteOptions(), db.family(Family::kAttention), it->key())
            .ok());
    break;
  }
  EXPECT_FALSE(VerifyStore(store()).sound());
}

TEST_F(AttentionStore, MergedAndSalvagedItIsTheSame) {
  Write();
  MergeStores({store(), store()}, folder_.path() / "merged", {});
  ExpectAll(folder_.path() / "merged");
  SalvageStore(store(), folder_.path() / "salvaged");
  ExpectAll(folder_.path() / "salvaged");
}

TEST_F(AttentionStore, ExportedAndImportedItIsTheSame) {
  Write();
  const fs::path out = folder_.path() / "export";
  ExportTraces(TraceReader(store()), out, {});
  ImportOptions options;
  options.format = "npz";
  ImportTraces(out / "traces.npz", folder_.path() / "imported", options);
  ExpectAll(folder_.path() / "imported");
}

// One sequence of two tokens, a layer, one head of either kind.
TEST_F(AttentionStore, ForeignAttentionIsRefusedWhereItDoesNotFit) {
  const auto import = [&](std::vector<uint16_t> keys, int64_t heads) {
    const std::vector<int64_t> none = {0, 0}, offsets = {0, 2}, index = {0, 1};
    const std::vector<uint16_t> ids = {0, 1};
    const std::vector<float> hidden = {1, 2}, entropy(static_cast<size_t>(2 * heads), 0);
    const std::vector<uint64_t> sequence = {5};
    const fs::path in = folder_.path() / "in.npz", out = folder_.path() / "out";
    fs::remove_all(out);
    WriteNpz(in, {{"encoder_offsets", "<i8", {2}, none.data(), 16},
                  {"encoder_expert_ids", "<u2", {0, 0}, nullptr, 0},
                  {"decoder_offsets", "<i8", {2}, offsets.data(), 16},
                  {"decoder_expert_ids", "<u2", {1, 2}, ids.data(), 4},
                  {"decoder_hidden", "<f4", {1, 2, 1}, hidden.data(), 8},
                  {"decoder_hidden_index", "<i8", {2}, index.data(), 16},
                  {"decoder_attention_entropy",
                   "<f4",
                   {1, 2, heads},
                   entropy.data(),
                   entropy.size() * 4},
                  {"decoder_attention_keys",
                   "<u2",
                   {1, 2, heads, kStrongestKeys},
                   keys.data(),
                   keys.size() * 2},
                  {"sequence_ids", "<u8", {1}, sequence.data(), 8},
                  {"document_ids", "<u8", {1}, sequence.data(), 8}});
    ImportTraces(in, out, {});
    EXPECT_TRUE(VerifyStore(out).sound());
  };
  std::vector<uint16_t> keys(16, kNoKey);
  keys[0] = 1;
  keys[4] = 400;  // cross-attention: of the encoder, whose length is not known
  EXPECT_NO_THROW(import(keys, 2));
  keys[0] = 2;
  EXPECT_THROW(import(keys, 2), DataError);
  EXPECT_THROW(import(std::vector<uint16_t>(8, 0), 1), DataError);  // decoders have pairs
}

TEST_F(AttentionStore, HasASchemaThatOlderProgramsRefuse) {
  Json json = config_.ToJson();
  EXPECT_EQ(json["schema"], kAttentionSchema);
  EXPECT_EQ(StoreConfig::FromJson(json, "test").AttentionHeads(Stack::kDecoder),
            2 * kHeads);
  json["schema"] = kOutputSchema;
  EXPECT_THROW(StoreConfig::FromJson(json, "test"), DataError);
  json["schema"] = kDroppedSchema;
  EXPECT_THROW(StoreConfig::FromJson(json, "test"), UsageError);
  json["schema"] = kAttentionSchema;
  json.erase("attention_heads");
  EXPECT_THROW(StoreConfig::FromJson(json, "test"), DataError);
}

TEST_F(AttentionStore, ATraceWithoutWhatTheStoreRecordsIsADefect) {
  TraceStore::CreateOrOpen(store(), config_);
  ChunkWriter writer(store(), config_, 0, "t");
  TraceShape without = shape_;
  without.hidden_share = 1;
  without.heads = 0;
  EXPECT_THROW(writer.Add(RandomTrace(5, without)), std::logic_error);
}

// The checksum holds, and the bytes under it are anybody's.
TEST_F(AttentionStore, HostileRecordsBesideTheRoutingAreRecordsOrRefused) {
  TraceShape all = shape_;
  all.hidden_share = 1;
  const RoutingSpan span = RandomTrace(7, all).decoder;
  const std::string key = EncodeKey(RecordKind::kDecoder, 7);
  int read = 0, refused = 0;
  for (const bool attention : {false, true}) {
    const std::string value =
        attention ? EncodeAttention(key, span) : EncodeHidden(key, span);
    const std::string body = value.substr(0, value.size() - kChecksumBytes);
    for (uint64_t seed = 0; seed < 5000; ++seed) {
      std::string bytes = Mutate(body, seed, {3, 8, {"\xFF", std::string(1, '\0')}});
      ByteWriter(&bytes).U64(Hash64(bytes, Hash64(key)));
      RoutingSpan back;
      back.num_tokens = span.num_tokens;
      back.num_layers = span.num_layers;
      try {
        attention ? DecodeAttention(key, bytes, "test", &back)
                  : DecodeHidden(key, bytes, "test", &back);
        ++read;
        EXPECT_TRUE(AttentionFits(back, Stack::kDecoder));
      } catch (const DataError&) {
        ++refused;
      }
    }
  }
  EXPECT_GT(read, 100);
  EXPECT_GT(refused, 100);
}

// Cut and flipped records, with a right checksum or without, are refused or harmless.
TEST_F(AttentionStore, DamagedRecordsAreRefused) {
  TraceShape all = shape_;
  all.hidden_share = 1;
  const RoutingTrace trace = RandomTrace(7, all);
  for (const Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
    const RoutingSpan& span = stack == Stack::kEncoder ? trace.encoder : trace.decoder;
    const std::string key = EncodeKey(KindOf(stack), 7);
    const std::string value = EncodeAttention(key, span);
    const auto decode = [&](const std::string& bytes) {
      RoutingSpan read;
      read.num_tokens = span.num_tokens;
      read.num_layers = span.num_layers;
      DecodeAttention(key, bytes, "test", &read);
      return read;
    };
    EXPECT_EQ(decode(value).attention_keys, span.attention_keys);
    EXPECT_EQ(decode(value).attention_entropy, span.attention_entropy);
    for (size_t at = 0; at < value.size(); ++at) {
      EXPECT_THROW(decode(value.substr(0, at)), DataError);
      std::string flipped = value;
      flipped[at] = static_cast<char>(flipped[at] ^ 0x10);
      EXPECT_THROW(decode(flipped), DataError);
    }
    RoutingSpan wrong = span;
    wrong.attention_keys[0] = static_cast<uint16_t>(span.num_tokens);
    EXPECT_FALSE(AttentionFits(wrong, stack));
    EXPECT_THROW(decode(EncodeAttention(key, wrong)), DataError);
  }
}

}  // namespace
}  // namespace routecast
