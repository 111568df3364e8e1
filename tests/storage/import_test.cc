#include "storage/import.h"

#include <zlib.h>

#include "storage/merge.h"
#include "storage/npy.h"
#include "storage/statistics.h"
#include "storage/verify.h"
#include "tests/storage/import_fixture.h"
#include "tests/support/reference.h"

namespace routecast {
namespace {

TEST_F(ImportTest, AnExportComesBackToTheLastByte) {
  Fill();
  const auto files = ExportTraces(TraceReader(store()), At("out"), {});
  ImportTraces(files.at(0), At("back"), {});
  EXPECT_EQ(Read(At("back")), Read(store()));
  EXPECT_EQ(Exported(At("back")), ReadFile(files[0]));
}

// The arrays of product.md alone: one sequence of one token and layer, in the decoder.
class ActiveImport : public ImportTest {
 protected:
  void Write(const std::vector<uint16_t>& active, const std::vector<uint16_t>& topk) {
    const auto k = static_cast<int64_t>(active.size()),
               all = static_cast<int64_t>(topk.size());
    std::vector<NamedArray> arrays = {
        {"sequence_ids", "<u8", {1}, &id_, 8},
        {"document_ids", "<u8", {1}, &id_, 8},
        {"encoder_offsets", "<i8", {2}, none_, 16},
        {"encoder_expert_ids", "<u2", {0, 0}, active.data(), 0},
        {"decoder_offsets", "<i8", {2}, one_, 16},
        {"decoder_expert_ids", "<u2", {1, 1}, active.data(), 2},
        {"decoder_active_ids", "<u2", {1, 1, k}, active.data(), 2 * active.size()}};
    if (all > 0) {
      arrays.push_back(
          {"decoder_topk_ids", "<u2", {1, 1, all}, topk.data(), 2 * topk.size()});
    }
    WriteNpz(At("in.npz"), arrays);
  }
  const uint64_t id_ = 7;
  const int64_t none_[2] = {0, 0}, one_[2] = {0, 1};
};

TEST_F(ActiveImport, OfADecoderAloneNeedsNoArraysOfAnEncoder) {
  const uint16_t expert = 5;
  WriteNpz(At("in.npz"), {{"sequence_ids", "<u8", {1}, &id_, 8},
                          {"document_ids", "<u8", {1}, &id_, 8},
                          {"decoder_offsets", "<i8", {2}, one_, 16},
                          {"decoder_expert_ids", "<u2", {1, 1}, &expert, 2}});
  const MoeGeometry geometry = Import("in.npz", {}).config.geometry;
  EXPECT_EQ(geometry.encoder_layers, 0);
  EXPECT_EQ(geometry.decoder_layers, 1);
}

TEST_F(ActiveImport, SaysHowManyExpertsATokenHas) {
  Write({5, 3}, {5, 3, 8});
  const StoreConfig config = Import("in.npz", {}).config;
  EXPECT_EQ(config.geometry.experts_per_token, 2);
  EXPECT_EQ(config.top_k, 3);
}

TEST_F(ActiveImport, AloneIsTheTopK) {
  Write({5, 3}, {});
  EXPECT_EQ(Import("in.npz", {}).config.geometry.experts_per_token, 2);
  EXPECT_EQ(Read(store()).at(0).decoder.topk_ids, (std::vector<uint16_t>{5, 3}));
}

TEST_F(ActiveImport, ThatIsNotTheFirstOfTheTopKIsRefused) {
  Write({5, 4}, {5, 3, 8});
  const std::string error = ErrorOf("in.npz", {});
  EXPECT_NE(error.find("not the first of topk_ids"), std::string::npos) << error;
}

TEST_F(ActiveImport, OfMoreExpertsThanTheTopKIsRefused) {
  Write({5, 3, 8}, {5, 3});
  const std::string error = ErrorOf("in.npz", {});
  EXPECT_NE(error.find("3 active experts of 2"), std::string::npos) << error;
}

TEST_F(ImportTest, AnExportOfSeveralExpertsComesBackToTheLastByte) {
  shape_.top_k = 4;
  config_ = ConfigOf(shape_, 4, kChunks);
  config_.geometry.experts_per_token = 2;
  Fill();
  const auto files = ExportTraces(TraceReader(store()), At("out"), {});
  EXPECT_NE(ReadFile(files.at(0)).find("decoder_active_ids"), std::string::npos);
  EXPECT_EQ(ImportTraces(files[0], At("back"), {}).config.geometry, config_.geometry);
  EXPECT_EQ(Read(At("back")), Read(store()));
  EXPECT_EQ(Exported(At("back")), ReadFile(files[0]));
}

TEST_F(ImportTest, PartsOfAnExportComeBack) {
  Fill();
  ASSERT_GT(ExportTraces(TraceReader(store()), At("out"), {"npz", 200'000}).size(), 2u);
  ImportTraces(At("out"), At("back"), {});
  EXPECT_EQ(Read(At("back")), Read(store()));
}

TEST_F(ImportTest, AnExportSaysItsGeometry) {
  Fill();
  const auto files = ExportTraces(TraceReader(store()), At("out"), {});
  EXPECT_EQ(ImportTraces(files.at(0), At("back"), {}).config.geometry, config_.geometry);
}

TEST_F(ImportTest, AnArrayIsARequest) {
  const auto a = Bytes(3, 2, 4), b = Bytes(6, 2, 4);
  const std::vector<uint32_t> tokens = {7, 8, 70000};
  WriteNpz(At("in.npz"), {{"a", "|u1", {3, 2, 4}, a.data(), a.size()},
                          {"a_token_ids", "<u4", {3}, tokens.data(), 12}});
  Import("in.npz", {.format = "arrays"});
  const auto traces = Read(store());
  ASSERT_EQ(traces.size(), 1u);
  ExpectRequest(traces[0], 0, 3, 2, 4);
  EXPECT_EQ(traces[0].decoder.token_ids, tokens);
}

TEST_F(ImportTest, OneExpertATokenNeedsNoTopK) {
  const auto a = Bytes(3, 2, 1);
  WriteNpz(At("in.npz"), {{"a", "|u1", {3, 2, 1}, a.data(), a.size()}});
  EXPECT_EQ(Import("in.npz", {.format = "arrays"}).config.top_k, 0);
  ExpectRequest(Read(store()).at(0), 0, 3, 2, 1);
}

TEST_F(ImportTest, NumbersThatAreNoExpertAreRefused) {
  const std::vector<int64_t> ids = {1, 2, 3, -1};
  WriteNpz(At("in.npz"), {{"a", "<i8", {2, 1, 2}, ids.data(), 32}});
  const std::string error = ErrorOf("in.npz", {.format = "arrays"});
  EXPECT_NE(error.find("element 3 is negative"), std::string::npos) << error;
  EXPECT_NE(error.find("leave rows of padding out"), std::string::npos) << error;
}

TEST_F(ImportTest, SequencesOfAnotherShapeAreRefused) {
  const auto ids = Bytes(4, 3, 4);
  WriteNpz(At("in.npz"), {{"a", "|u1", {2, 2, 4}, ids.data(), 16},
                          {"b", "|u1", {2, 3, 4}, ids.data(), 24}});
  const std::string error = ErrorOf("in.npz", {.format = "arrays"});
  EXPECT_NE(error.find("sequence 1"), std::string::npos) << error;
  EXPECT_NE(error.find("are the axes"), std::string::npos) << error;
}

TEST_F(ImportTest, ArraysThatAreTakenForAnExportAreTold) {
  const auto a = Bytes(3, 2, 4);
  WriteNpz(At("in.npz"), {{"a", "|u1", {3, 2, 4}, a.data(), a.size()}});
  const std::string error = ErrorOf("in.npz", {.format = "npz"});
  EXPECT_NE(error.find("--format=arrays"), std::string::npos) << error;
}

// As many as a store's configuration can say, and one more.
TEST_F(ImportTest, MoreAttentionHeadsThanAStoreCanSayAreRefused) {
  const std::vector<int64_t> none = {0, 0}, one = {0, 1};
  const std::vector<uint64_t> id = {7};
  const std::vector<uint16_t> zero(4 * (kMaxAttentionHeads + 1));
  const std::vector<float> entropy(kMaxAttentionHeads + 1);
  for (const int64_t heads : {kMaxAttentionHeads, kMaxAttentionHeads + 1}) {
    const auto count = static_cast<uint64_t>(heads);
    WriteNpz(
        At("in.npz"),
        {{"sequence_ids", "<u8", {1}, id.data(), 8},
         {"document_ids", "<u8", {1}, id.data(), 8},
         {"encoder_offsets", "<i8", {2}, one.data(), 16},
         {"encoder_expert_ids", "<u2", {1, 1}, zero.data(), 2},
         {"encoder_hidden", "<f4", {1, 1, 1}, entropy.data(), 4},
         {"encoder_hidden_index", "<i8", {1}, none.data(), 8},
         {"encoder_attention_entropy", "<f4", {1, 1, heads}, entropy.data(), 4 * count},
         {"encoder_attention_keys", "<u2", {1, 1, heads, 4}, zero.data(), 8 * count},
         {"decoder_offsets", "<i8", {2}, none.data(), 16},
         {"decoder_expert_ids", "<u2", {0, 0}, zero.data(), 0}});
    if (heads > kMaxAttentionHeads) {
      EXPECT_NE(ErrorOf("in.npz", {}).find("attention of 4097 heads"), std::string::npos);
      continue;
    }
    ImportTraces(At("in.npz"), At("most"), {});
    EXPECT_EQ(TraceReader(At("most"), NeedTokens::kNo).config().attention_heads, heads);
  }
}

// A flipped bit in a margin would be a margin like any other.
TEST_F(ImportTest, AFlippedBitOfAnExportIsFound) {
  Fill(1);
  ExportTraces(TraceReader(store()), At("."), {});
  std::string bytes = ReadFile(At("traces.npz"));
  const size_t name = bytes.find("decoder_margins.npy");
  bytes.at(name + 300) = static_cast<char>(bytes.at(name + 300) ^ 4);
  WriteFileAtomic(At("traces.npz"), bytes);
  EXPECT_NE(ErrorOf("traces.npz", {}).find("array \"decoder_margins\""),
            std::string::npos);
}

TEST_F(ImportTest, AFileWhoseNameIsNotUtf8IsRead) {
  const std::vector<uint8_t> a = Bytes(3, 2, 4);
  fs::create_directories(At("in"));
  WriteNpz(At("in") / "caf\xe9.npz", {{"a", "|u1", {3, 2, 4}, a.data(), a.size()}});
  EXPECT_EQ(Import("in", {.format = "arrays"}).config.data,
            std::vector<std::string>{"arrays:caf\xef\xbf\xbd.npz"});
}

TEST_F(ImportTest, NumPyFilesOfManyTypesAreRead) {
  MakeFolder(At("npy"));
  ASSERT_EQ(RunReference("write_routing.py", At("npy").string()), 0);
  Import("npy", {.format = "arrays"});
  const auto traces = Read(store());
  ASSERT_EQ(traces.size(), 6u);
  for (int i = 0; i < 6; ++i) ExpectRequest(traces[i], 0, i + 1, 2, 4);
}

TEST_F(ImportTest, LinesAreRequests) {
  WriteFileAtomic(At("in.jsonl"),
                  "{\"id\": \"x\", \"routing\": [[[0,1],[2,3]],[[5,6],[7,8]]], "
                  "\"token_ids\": [9,10]}\n\n"
                  "{\"routing\": [[[0,1],[2,3]]], \"token_ids\": [4]}");
  Import("in.jsonl", {.format = "jsonl"});
  const auto traces = Read(store());
  ASSERT_EQ(traces.size(), 2u);
  ExpectRequest(traces[0], 0, 2, 2, 2);
  ExpectRequest(traces[1], 0, 1, 2, 2);
  EXPECT_EQ(traces[0].decoder.token_ids, (std::vector<uint32_t>{9, 10}));
}

// More than a block of a mebibyte once unpacked, in two parts, as a log that was gone on
// with.
TEST_F(ImportTest, PackedLinesAreRequests) {
  const std::string first = "{\"routing\": [[[0,1],[2,3]],[[5,6],[7,8]]]}\n" +
                            std::string((1 << 20) - 20, ' ') + "\n",
                    second = "{\"routing\": [[[0,1],[2,3]]]}\n";
  for (const std::string* part : {&first, &second}) {
    gzFile out = gzopen(At("in.jsonl.gz").c_str(), part == &first ? "wb" : "ab");
    gzwrite(out, part->data(), static_cast<unsigned>(part->size()));
    gzclose(out);
  }
  Import("in.jsonl.gz", {.format = "jsonl"});
  const auto traces = Read(store());
  ASSERT_EQ(traces.size(), 2u);
  ExpectRequest(traces[0], 0, 2, 2, 2);
  ExpectRequest(traces[1], 0, 1, 2, 2);
}

TEST_F(ImportTest, PackedLinesThatEndEarlyAreRefused) {
  gzFile out = gzopen(At("in.jsonl.gz").c_str(), "wb");
  gzputs(out, "{\"routing\": [[[0,1],[2,3]]]}\n");
  gzclose(out);
  const std::string whole = ReadFile(At("in.jsonl.gz"));
  WriteFileAtomic(At("cut.jsonl.gz"), whole.substr(0, whole.size() - 6));
  EXPECT_NE(ErrorOf("cut.jsonl.gz", {.format = "jsonl"}).find("ends early"),
            std::string::npos);
  WriteFileAtomic(At("other.jsonl.gz"), "{\"routing\": [[[0,1],[2,3]]]}\n");
  EXPECT_NE(ErrorOf("other.jsonl.gz", {.format = "jsonl"}).find("gzip"),
            std::string::npos);
}

TEST_F(ImportTest, ProbabilitiesFollowTheirExperts) {
  WriteFileAtomic(At("in.jsonl"),
                  "{\"routing\": [[[1,0]]], \"probs\": [[[0.5,0.25]]]}\n");
  EXPECT_TRUE(Import("in.jsonl", {.format = "jsonl"}).config.Records("probs"));
  const RoutingSpan span = Read(store()).at(0).decoder;
  EXPECT_EQ(span.gate_probs, std::vector<float>{0.5f});
  EXPECT_EQ(span.topk_probs, (std::vector<float>{0.5f, 0.25f}));
}

struct BadLine {
  const char *name, *line, *says;
};
std::ostream& operator<<(std::ostream& out, const BadLine& c) { return out << c.name; }
class ImportLines : public ImportTest, public testing::WithParamInterface<BadLine> {};
TEST_P(ImportLines, AreRefusedWithTheirPlace) {
  WriteFileAtomic(At("in.jsonl"),
                  "{\"routing\": [[[0,1]]]}\n" + std::string(GetParam().line) + "\n");
  const std::string error = ErrorOf("in.jsonl", {.format = "jsonl"});
  EXPECT_NE(error.find(GetParam().says), std::string::npos) << error;
}
INSTANTIATE_TEST_SUITE_P(
    Bad, ImportLines,
    testing::Values(BadLine{"NoJson", "nonsense", "line 2"},
                    BadLine{"NoRouting", "{}", "line 2"},
                    BadLine{"Flat", "{\"routing\": [1,2]}", "no list of lists of lists"},
                    BadLine{"Empty", "{\"routing\": []}", "no list of lists of lists"},
                    BadLine{"Ragged", "{\"routing\": [[[0,1]],[[0]]]}",
                            "[1][0] has 1 entries, not 2"},
                    BadLine{"Negative", "{\"routing\": [[[0,-1]]]}", "-1"},
                    BadLine{"Large", "{\"routing\": [[[0,65536]]]}", "65536"},
                    BadLine{"Twice", "{\"routing\": [[[3,3]]]}", "expert 3 twice"},
                    BadLine{"Tokens", "{\"routing\": [[[0,1]]], \"token_ids\": [1,2]}",
                            "list of 1"},
                    BadLine{"Probs", "{\"routing\": [[[0,1]]], \"probs\": [[[0.5,2]]]}",
                            "probability"},
                    BadLine{"OtherK", "{\"routing\": [[[0,1,2]]]}", "sequence 1"},
                    BadLine{"SomeTokens", "{\"routing\": [[[0,1]]], \"token_ids\": [1]}",
                            "sequence 1"}),
    [](const auto& info) { return std::string(info.param.name); });

TEST_F(ImportTest, ProbabilitiesPutATokensExpertsIntoTheirOrder) {
  WriteFileAtomic(At("in.jsonl"),
                  "{\"routing\": [[[4,2,7],[1,0,3]]], "
                  "\"probs\": [[[0.25,0.5,0.25],[0.5,0.25,0.125]]]}\n");
  Import("in.jsonl", {.format = "jsonl"});
  const RoutingSpan span = Read(store()).at(0).decoder;
  EXPECT_EQ(span.expert_ids, (std::vector<uint16_t>{2, 1}));
  EXPECT_EQ(span.gate_probs, (std::vector<float>{0.5f, 0.5f}));
  EXPECT_EQ(span.topk_ids, (std::vector<uint16_t>{2, 4, 7, 1, 0, 3}));
  EXPECT_EQ(span.topk_probs,
            (std::vector<float>{0.5f, 0.25f, 0.25f, 0.5f, 0.25f, 0.125f}));
}

TEST_F(ImportTest, TheNumberOfExpertsIsTheLargestIdsOrGiven) {
  WritePacked();
  EXPECT_EQ(Import("index_x.csv", packed_).config.geometry.num_experts, 30);
  ImportOptions given = packed_;
  given.num_experts = 32;
  EXPECT_EQ(
      ImportTraces(At("index_x.csv"), At("given"), given).config.geometry.num_experts,
      32);
}

TEST_F(ImportTest, FewerExpertsThanIdsAreRefused) {
  WritePacked();
  ImportOptions given = packed_;
  given.num_experts = 8;
  EXPECT_NE(ErrorOf<UsageError>("index_x.csv", given).find("8 experts"),
            std::string::npos);
}

TEST_F(ImportTest, AnEmptyInputIsRefused) {
  WriteFileAtomic(At("in.jsonl"), "\n");
  EXPECT_NE(ErrorOf<UsageError>("in.jsonl", {.format = "jsonl"}).find("empty"),
            std::string::npos);
}

TEST_F(ImportTest, AStoreWithoutTokenIdsIsSound) {
  WritePacked();
  Import("index_x.csv", packed_);
  const VerifyReport report = VerifyStore(store());
  EXPECT_TRUE(report.sound()) << report.problems.at(0);
}

TEST_F(ImportTest, RecordsWithoutTheTokenIdsThatStoreJsonNamesAreDamage) {
  WritePacked();
  Import("index_x.csv", packed_);
  Json json = ReadJsonFile(store() / "store.json");
  json.erase("token_ids");
  WriteFileAtomic(store() / "store.json", json.dump());
  EXPECT_FALSE(VerifyStore(store()).sound());
}

TEST_F(ImportTest, ACollectedSequenceMustHaveTokenIds) {
  Create();
  RoutingTrace trace = RandomTrace(1, shape_);
  trace.decoder.token_ids.clear();
  EXPECT_THROW(ChunkWriter(store(), config_, 0, "t").Add(trace), std::logic_error);
}

TEST_F(ImportTest, AReaderThatNeedsTokenIdsIsToldThatThereAreNone) {
  WritePacked();
  Import("index_x.csv", packed_);
  EXPECT_THROW(TraceReader{store()}, UsageError);
}

TEST_F(ImportTest, AnExportWithoutTokenIdsComesBack) {
  WritePacked();
  Import("index_x.csv", packed_);
  const std::string exported = Exported(store());
  EXPECT_EQ(exported.find("decoder_token_ids"), std::string::npos);
  EXPECT_EQ(exported.find("decoder_topk_probs"), std::string::npos);
  ImportTraces(At("export") / "traces.npz", At("back"), {});
  EXPECT_EQ(Exported(At("back")), exported);
}

TEST_F(ImportTest, RowsOfTextWithoutTokenIdsLeaveThemOut) {
  WritePacked();
  Import("index_x.csv", packed_);
  const uint64_t group = Read(store()).at(0).group_id;
  const std::string row = "0,0,decoder,0,1,,5,,,,5 6 7 8,5 6 7 8,," +
                          std::to_string(group) + "," + SplitPartName(SplitOf(group));
  EXPECT_NE(Exported(store(), "csv").find(row + "\n"), std::string::npos);
  const std::string lines = Exported(store(), "jsonl");
  const Json first = ParseJson(lines.substr(0, lines.find('\n')), "line");
  EXPECT_TRUE(first["decoder"].contains("expert_ids"));
  EXPECT_FALSE(first["decoder"].contains("token_ids"));
  EXPECT_EQ(first["decoder"]["active_ids"][0][1], Json({5, 6, 7, 8}));
  EXPECT_FALSE(first["decoder"].contains("topk_probs"));
}

TEST_F(ImportTest, ImportsOfOneModelMerge) {
  WritePacked();
  ImportTraces(At("index_x.csv"), At("a"), packed_);
  WritePacked("1,2\n", 3);
  ImportOptions more = packed_;
  more.num_experts = 30;
  ImportTraces(At("index_x.csv"), At("b"), more);
  EXPECT_EQ(MergeStores({At("a"), At("b")}, At("c"), {.renumber = true}).sequences, 3u);
}

TEST_F(ImportTest, StatisticsCountAllExpertsOfAToken) {
  // One layer; tokens use {0,1}, {1,2}, {1,0}; then a sequence of {3,0} alone.
  WriteFileAtomic(At("in.jsonl"),
                  "{\"routing\": [[[0,1]],[[1,2]],[[1,0]]]}\n{\"routing\": [[[3,0]]]}\n");
  Import("in.jsonl", {.format = "jsonl"});
  const auto stats = ComputeStatistics(TraceReader(store(), NeedTokens::kNo));
  EXPECT_EQ(stats.layers.at(0).slot_counts, (std::vector<uint64_t>{3, 3, 1, 1}));
  EXPECT_EQ(stats.layers[0].counts, (std::vector<uint64_t>{1, 2, 0, 1}));
  EXPECT_DOUBLE_EQ(stats.layers[0].previous_token_recall, 2.0 / 4);
}

TEST_F(ImportTest, DropsThatWereNotRecordedAreNotKnown) {
  WriteFileAtomic(At("in.jsonl"), "{\"routing\": [[[0,1]],[[1,2]]]}\n");
  Import("in.jsonl", {.format = "jsonl"});
  const auto stats = ComputeStatistics(TraceReader(store(), NeedTokens::kNo));
  EXPECT_TRUE(stats.ToJson().at("layers").at(0).at("dropped").is_null());
}

}  // namespace
}  // namespace routecast
