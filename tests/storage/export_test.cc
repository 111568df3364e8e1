#include "storage/export.h"

#include <zlib.h>

#include <algorithm>
#include <set>
#include <sstream>

#include "common/errors.h"
#include "common/safetensors.h"
#include "tests/storage/store_fixture.h"
#include "tests/support/reference.h"

namespace routecast {
namespace {

// What the arrays must be, by a slow and obvious walk: bytes of every array by name.
struct Expected {
  std::string dtype, shape;
  std::string bytes;
};

template <typename T>
void Put(std::string* bytes, T value) {
  bytes->append(reinterpret_cast<const char*>(&value), sizeof value);
}

std::map<std::string, Expected> Reference(const std::map<uint64_t, RoutingTrace>& all,
                                          const TraceShape& shape) {
  std::map<std::string, Expected> out;
  const auto n = std::to_string(all.size());
  out["sequence_ids"] = {"<u8", n, ""};
  out["document_ids"] = {"<u8", n, ""};
  out["group_ids"] = {"<u8", n, ""};
  out["tasks"] = {"|u1", n, ""};
  out["geometry"] = {"<i8", "5", ""};
  for (const int number :
       {shape.layers, shape.layers, shape.num_experts, 1, shape.width}) {
    Put(&out["geometry"].bytes, static_cast<int64_t>(number));
  }
  for (const auto& [id, trace] : all) {
    Put(&out["sequence_ids"].bytes, trace.sequence_id);
    Put(&out["document_ids"].bytes, trace.document_id);
    Put(&out["group_ids"].bytes, trace.group_id);
    Put(&out["tasks"].bytes, static_cast<uint8_t>(trace.task));
  }
  for (const std::string stack : {"encoder", "decoder"}) {
    const auto of = [&](const RoutingTrace& t) -> const RoutingSpan& {
      return stack == "encoder" ? t.encoder : t.decoder;
    };
    int64_t tokens = 0, hidden_tokens = 0;
    std::string offsets, token_ids, index, output;
    Put(&offsets, tokens);
    for (const auto& [id, trace] : all) {
      const RoutingSpan& s = of(trace);
      for (int t = 0; t < s.num_tokens; ++t) {
        Put(&token_ids, s.token_ids[t]);
        if (s.hidden_width > 0) Put(&index, tokens + t), ++hidden_tokens;
      }
      for (const uint16_t bits : s.output) Put(&output, Bf16ToFloat(bits));
      tokens += s.num_tokens;
      Put(&offsets, tokens);
    }
    std::string ids, probs, dropped, margins, topk_ids, topk_probs, hidden;
    for (int l = 0; l < shape.layers; ++l) {
      for (const auto& [id, trace] : all) {
        const RoutingSpan& s = of(trace);
        for (int t = 0; t < s.num_tokens; ++t) {
          const int i = l * s.num_tokens + t;
          Put(&ids, s.expert_ids[i]);
          Put(&probs, s.gate_probs[i]);
          Put(&dropped, s.dropped[i]);
          Put(&margins, s.margins[i]);
          for (int k = 0; k < shape.top_k; ++k) {
            Put(&topk_ids, s.topk_ids[i * shape.top_k + k]);
            Put(&topk_probs, s.topk_probs[i * shape.top_k + k]);
          }
          for (int d = 0; d < s.hidden_width; ++d) {
            Put(&hidden, Bf16ToFloat(s.hidden[i * s.hidden_width + d]));
          }
        }
      }
    }
    const std::string L = std::to_string(shape.layers), T = std::to_string(tokens),
                      K = std::to_string(shape.top_k), D = std::to_string(shape.width),
                      H = std::to_string(hidden_tokens);
    out[stack + "_offsets"] = {"<i8", std::to_string(all.size() + 1), offsets};
    out[stack + "_token_ids"] = {"<u4", T, token_ids};
    out[stack + "_expert_ids"] = {"<u2", L + "x" + T, ids};
    out[stack + "_gate_probs"] = {"<f4", L + "x" + T, probs};
    out[stack + "_dropped"] = {"|u1", L + "x" + T, dropped};
    out[stack + "_margins"] = {"<f4", L + "x" + T, margins};
    out[stack + "_topk_ids"] = {"<u2", L + "x" + T + "x" + K, topk_ids};
    out[stack + "_topk_probs"] = {"<f4", L + "x" + T + "x" + K, topk_probs};
    out[stack + "_hidden"] = {"<f4", L + "x" + H + "x" + D, hidden};
    out[stack + "_hidden_index"] = {"<i8", H, index};
    if (!output.empty()) out[stack + "_output"] = {"<f4", H + "x" + D, output};
  }
  return out;
}

TEST_F(TraceStoreTest, NumpyOpensTheNpz) {
  Fill();
  const auto files = ExportTraces(TraceReader(store()), folder_.path() / "out", {});
  ASSERT_EQ(files.size(), 1u);
  EXPECT_EQ(files[0].filename(), "traces.npz");
  const fs::path listing = folder_.path() / "listing";
  ASSERT_EQ(RunReference("open_npz.py", files[0].string() + " " + listing.string()), 0);
  std::string expected;
  for (const auto& [name, array] : Reference(All(), shape_)) {
    char crc[16];
    std::snprintf(crc, sizeof crc, "%08lx",
                  crc32(0, reinterpret_cast<const Bytef*>(array.bytes.data()),
                        static_cast<uInt>(array.bytes.size())));
    expected += name + " " + array.dtype + " " + array.shape + " " + crc + "\n";
  }
  EXPECT_EQ(ReadFile(listing), expected);
}

TEST_F(TraceStoreTest, SafetensorsHoldTheSameArrays) {
  Fill();
  ExportOptions options;
  options.format = "safetensors";
  const auto files = ExportTraces(TraceReader(store()), folder_.path() / "out", options);
  const SafetensorsIndex index = ReadSafetensorsIndex(files.at(0));
  const auto expected = Reference(All(), shape_);
  EXPECT_EQ(index.tensors.size(), expected.size());
  for (const auto& [name, array] : expected) {
    const TensorEntry* entry = index.Find(name);
    ASSERT_NE(entry, nullptr) << name;
    EXPECT_EQ(ReadTensorBytes(files[0], *entry), array.bytes) << name;
  }
}

TEST_F(TraceStoreTest, LargeStoresBecomeParts) {
  Fill();
  ExportOptions options;
  options.format = "safetensors";
  options.max_part_bytes = 200'000;
  const auto files = ExportTraces(TraceReader(store()), folder_.path() / "out", options);
  ASSERT_GT(files.size(), 2u);
  EXPECT_EQ(files[1].filename(), "traces-00001.safetensors");
  std::string ids;
  for (const fs::path& file : files) {
    const SafetensorsIndex index = ReadSafetensorsIndex(file);
    ids += ReadTensorBytes(file, *index.Find("sequence_ids"));
  }
  EXPECT_EQ(ids, Reference(All(), shape_).at("sequence_ids").bytes);
}

TEST_F(TraceStoreTest, JsonLinesHoldEverySequence) {
  Fill();
  ExportOptions options;
  options.format = "jsonl";
  const auto files = ExportTraces(TraceReader(store()), folder_.path() / "out", options);
  std::istringstream lines(ReadFile(files.at(0)));
  const auto all = All();
  auto expected = all.begin();
  for (std::string line; std::getline(lines, line); ++expected) {
    const Json json = ParseJson(line, "line");
    ASSERT_NE(expected, all.end());
    const RoutingSpan& s = expected->second.decoder;
    EXPECT_EQ(json["sequence_id"], expected->first);
    EXPECT_EQ(json["decoder"]["token_ids"].get<std::vector<uint32_t>>(), s.token_ids);
    EXPECT_EQ(json["decoder"]["expert_ids"][1][0], s.expert_ids[s.num_tokens]);
    EXPECT_EQ(json["decoder"]["gate_probs"][2][0].get<float>(),
              s.gate_probs[2 * s.num_tokens]);
  }
  EXPECT_EQ(expected, all.end());
}

TEST_F(TraceStoreTest, CsvHasARowATokenAndLayer) {
  Fill();
  ExportOptions options;
  options.format = "csv";
  const auto files = ExportTraces(TraceReader(store()), folder_.path() / "out", options);
  const std::string text = ReadFile(files.at(0));
  size_t rows = 1;
  for (const auto& [id, t] : All()) {
    rows += t.encoder.expert_ids.size() + t.decoder.expert_ids.size();
  }
  EXPECT_EQ(static_cast<size_t>(std::count(text.begin(), text.end(), '\n')), rows);
}

TEST_F(TraceStoreTest, AnExportLeavesNoPartOfAnEarlierOne) {
  Fill();
  const TraceReader reader(store());
  const fs::path out = folder_.path() / "out";
  const auto first = ExportTraces(reader, out, {.max_part_bytes = 100'000});
  ASSERT_GT(first.size(), 2u);
  // Neither another format, nor what others put there, is a part.
  for (const char* name : {"traces-00000.csv", "traces-2.npz", "traces-00000a.npz"}) {
    WriteFileAtomic(out / name, "mine");
  }
  const auto names = [&] {
    std::set<std::string> all;
    for (const auto& entry : fs::directory_iterator(out)) {
      all.insert(entry.path().filename());
    }
    return all;
  };
  ExportTraces(reader, out, {});
  const std::set<std::string> others = {"traces-00000.csv", "traces-00000a.npz",
                                        "traces-2.npz"};
  std::set<std::string> expected = others;
  expected.insert("traces.npz");
  EXPECT_EQ(names(), expected);
  EXPECT_EQ(ExportTraces(reader, out, {.max_part_bytes = 100'000}), first);
  expected = others;
  for (const fs::path& file : first) expected.insert(file.filename());
  EXPECT_EQ(names(), expected);
}

// A plane shorter than its shape would be written with what lies behind it in memory.
TEST_F(TraceStoreTest, RecordsThatDifferInTheirPlanesAreRefusedAsArrays) {
  config_ = ConfigOf(shape_, 1, 1);
  Create();
  ChunkWriter writer(store(), config_, 0, "t");
  writer.Add(RandomTrace(1, shape_));
  RoutingTrace other = RandomTrace(2, shape_);
  other.decoder.margins.clear();
  writer.Add(other);
  writer.Finish();
  ShardOwner(store(), config_, 0, 1).Ingest(0, "t");
  const TraceReader reader(store());
  const fs::path out = folder_.path() / "out";
  for (const std::string format : {"npz", "safetensors"}) {
    EXPECT_THROW(ExportTraces(reader, out, {.format = format}), DataError);
    EXPECT_TRUE(fs::is_empty(out));
  }
  EXPECT_NO_THROW(ExportTraces(reader, out, {.format = "jsonl"}));
}

TEST_F(TraceStoreTest, AnUnknownFormatNamesTheNearest) {
  Fill(1);
  ExportOptions options;
  options.format = "npy";
  EXPECT_THROW(ExportTraces(TraceReader(store()), folder_.path() / "out", options),
               UsageError);
}

}  // namespace
}  // namespace routecast
