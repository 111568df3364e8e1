// Attention summaries from a chunk to a reader, an export and back; what is wrong with
// them is found.
#include <gtest/gtest.h>

#include "common/errors.h"
#include "storage/export.h"
#include "storage/import.h"
#include "storage/merge.h"
#include "storage/npy.h"
#include "storage/salvage.h"
#include "storage/trace_format.h"
#include "storage/trace_reader.h"
#include "storage/verify.h"
#include "tests/storage/random_trace.h"
#include "tests/storage/temp_folder.h"

namespace routecast {
namespace {

constexpr int kHeads = 3;
constexpr uint32_t kStoreChunks = 2;
constexpr uint64_t kSequences = 6;  // a chunk

void AddAttention(RoutingSpan* span, Stack stack, uint64_t key) {
  if (span->hidden_width == 0) return;
  span->attention_heads = kHeads * (stack == Stack::kDecoder ? 2 : 1);
  const uint64_t rows =
      static_cast<uint64_t>(span->num_tokens * span->num_layers * span->attention_heads);
  for (uint64_t i = 0; i < rows; ++i) {
    const auto entropy = static_cast<float>(3 * ToUnit(Mix(key, i)));
    span->attention_entropy.push_back(Bf16ToFloat(FloatToBf16(entropy)));
    for (uint64_t k = 0; k < kStrongestKeys; ++k) {
      const auto tokens = static_cast<uint64_t>(span->num_tokens);
      span->attention_keys.push_back(
          k < tokens ? static_cast<uint16_t>(ToRange(Mix(key, i, k), tokens)) : kNoKey);
    }
  }
}

RoutingTrace Attended(uint64_t id, const TraceShape& shape) {
  RoutingTrace trace = RandomTrace(id, shape);
  AddAttention(&trace.encoder, Stack::kEncoder, Mix(id, 1));
  AddAttention(&trace.decoder, Stack::kDecoder, Mix(id, 2));
  return trace;
}

class AttentionStore : public testing::Test {
 protected:
  AttentionStore() {
    config_.record = {"attention", "hidden", "ids", "output", "probs", "topk"};
    config_.attention_heads = kHeads;
  }
  fs::path store() const { return folder_.path() / "store"; }
  void Write() {
    TraceStore::CreateOrOpen(store(), config_);
    ShardOwner owner(store(), config_, 0, 1);
    for (uint32_t c = 0; c < kStoreChunks; ++c) {
      ChunkWriter writer(store(), config_, c, "t");
      for (const auto& [id, trace] : ChunkTraces(c, kStoreChunks, kSequences, shape_)) {
        writer.Add(Attended(id, shape_));
      }
      writer.Finish();
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
          EXPECT_EQ(trace, Attended(trace.sequence_id, shape_));
          attended += trace.encoder.attention_heads > 0;
        },
        WithHidden::kYes);
    EXPECT_GT(attended, 0);
    EXPECT_LT(attended, static_cast<int>(reader.sequences().size()));
    EXPECT_TRUE(VerifyStore(store).sound());
  }
  TempFolder folder_;
  TraceShape shape_ = {.num_experts = 16, .layers = 2, .width = 4, .max_tokens = 9};
  StoreConfig config_ = ConfigOf(shape_, 2, kStoreChunks);
};

TEST_F(AttentionStore, GivesBackWhatWasWritten) {
  Write();
  ExpectAll(store());
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
  json["schema"] = kAttentionSchema;
  json.erase("attention_heads");
  EXPECT_THROW(StoreConfig::FromJson(json, "test"), DataError);
}

TEST_F(AttentionStore, ATraceWithoutWhatTheStoreRecordsIsADefect) {
  TraceStore::CreateOrOpen(store(), config_);
  ChunkWriter writer(store(), config_, 0, "t");
  TraceShape all = shape_;
  all.hidden_share = 1;
  EXPECT_THROW(writer.Add(RandomTrace(5, all)), std::logic_error);
}

// Cut and flipped records, with a right checksum or without, are refused or harmless.
TEST_F(AttentionStore, DamagedRecordsAreRefused) {
  TraceShape all = shape_;
  all.hidden_share = 1;
  const RoutingTrace trace = Attended(7, all);
  for (const Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
    const RoutingSpan& span = stack == Stack::kEncoder ? trace.encoder : trace.decoder;
    const std::string key = EncodeKey(KindOf(stack), 7);
    const std::string value = EncodeHidden(key, span);
    const auto decode = [&](const std::string& bytes) {
      RoutingSpan read;
      read.num_tokens = span.num_tokens;
      read.num_layers = span.num_layers;
      DecodeHidden(key, bytes, "test", &read);
      return read;
    };
    EXPECT_EQ(decode(value).attention_keys, span.attention_keys);
    EXPECT_EQ(decode(value).output, span.output);
    for (size_t at = 0; at < value.size(); ++at) {
      EXPECT_THROW(decode(value.substr(0, at)), DataError);
      std::string flipped = value;
      flipped[at] = static_cast<char>(flipped[at] ^ 0x10);
      EXPECT_THROW(decode(flipped), DataError);
    }
    RoutingSpan wrong = span;
    wrong.attention_keys[0] = static_cast<uint16_t>(span.num_tokens);
    EXPECT_FALSE(AttentionFits(wrong, stack));
    EXPECT_THROW(decode(EncodeHidden(key, wrong)), DataError);
  }
}

}  // namespace
}  // namespace routecast
