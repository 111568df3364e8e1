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
                                          const TraceShape& shape, int active = 1) {
  std::map<std::string, Expected> out;
  const auto n = std::to_string(all.size());
  out["sequence_ids"] = {"<u8", n, ""};
  out["document_ids"] = {"<u8", n, ""};
  out["group_ids"] = {"<u8", n, ""};
  out["split"] = {"|u1", n, ""};
  out["tasks"] = {"|u1", n, ""};
  out["geometry"] = {"<i8", "5", ""};
  for (const int number :
       {shape.layers, shape.layers, shape.num_experts, active, shape.width}) {
    Put(&out["geometry"].bytes, static_cast<int64_t>(number));
  }
  for (const auto& [id, trace] : all) {
    Put(&out["sequence_ids"].bytes, trace.sequence_id);
    Put(&out["document_ids"].bytes, trace.document_id);
    Put(&out["group_ids"].bytes, trace.group_id);
    Put(&out["split"].bytes, static_cast<uint8_t>(SplitOf(trace.group_id)));
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
    std::string ids, probs, dropped, margins, active_ids, topk_ids, topk_probs, hidden;
    for (int l = 0; l < shape.layers; ++l) {
      for (const auto& [id, trace] : all) {
        const RoutingSpan& s = of(trace);
        for (int t = 0; t < s.num_tokens; ++t) {
          const int i = l * s.num_tokens + t;
          Put(&ids, s.expert_ids[i]);
          Put(&probs, s.gate_probs[i]);
          Put(&dropped, s.dropped[i]);
          Put(&margins, s.margins[i]);
          for (int k = 0; active > 1 && k < active; ++k) {
            Put(&active_ids, s.topk_ids[i * shape.top_k + k]);
          }
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
    if (active > 1) {
      out[stack + "_active_ids"] = {"<u2", L + "x" + T + "x" + std::to_string(active),
                                    active_ids};
    }
    out[stack + "_topk_ids"] = {"<u2", L + "x" + T + "x" + K, topk_ids};
    out[stack + "_topk_probs"] = {"<f4", L + "x" + T + "x" + K, topk_probs};
    out[stack + "_hidden"] = {"<f4", L + "x" + H + "x" + D, hidden};
    out[stack + "_hidden_index"] = {"<i8", H, index};
    if (!output.empty()) out[stack + "_output"] = {"<f4", H + "x" + D, output};
  }
  return out;
}

// A model that routes to two experts, and the four most probable recorded.
class SeveralActive : public TraceStoreTest {
 protected:
  SeveralActive() {
    shape_.top_k = 4;
    config_ = ConfigOf(shape_, 4, kChunks);
    config_.geometry.experts_per_token = 2;
  }
};

// One line an array: name, type, shape, CRC-32.
std::string Listing(const std::map<std::string, Expected>& arrays) {
  std::string lines;
  for (const auto& [name, array] : arrays) {
    char crc[16];
    std::snprintf(crc, sizeof crc, "%08lx",
                  crc32(0, reinterpret_cast<const Bytef*>(array.bytes.data()),
                        static_cast<uInt>(array.bytes.size())));
    lines += name + " " + array.dtype + " " + array.shape + " " + crc + "\n";
  }
  return lines;
}

TEST_F(TraceStoreTest, NumpyOpensTheNpz) {
  Fill();
  const auto files = ExportTraces(TraceReader(store()), folder_.path() / "out", {});
  ASSERT_EQ(files.size(), 1u);
  EXPECT_EQ(files[0].filename(), "traces.npz");
  const fs::path listing = folder_.path() / "listing";
  ASSERT_EQ(RunReference("open_npz.py", files[0].string() + " " + listing.string()), 0);
  EXPECT_EQ(ReadFile(listing), Listing(Reference(All(), shape_)));
}

TEST_F(SeveralActive, NumpyFindsTheActiveExperts) {
  Fill();
  const auto files = ExportTraces(TraceReader(store()), folder_.path() / "out", {});
  const fs::path listing = folder_.path() / "listing";
  ASSERT_EQ(RunReference("open_npz.py", files[0].string() + " " + listing.string()), 0);
  EXPECT_EQ(ReadFile(listing), Listing(Reference(All(), shape_, 2)));
}

void ExpectTensors(const fs::path& file, const std::map<std::string, Expected>& arrays) {
  const SafetensorsIndex index = ReadSafetensorsIndex(file);
  EXPECT_EQ(index.tensors.size(), arrays.size());
  for (const auto& [name, array] : arrays) {
    const TensorEntry* entry = index.Find(name);
    ASSERT_NE(entry, nullptr) << name;
    EXPECT_EQ(ReadTensorBytes(file, *entry), array.bytes) << name;
  }
}

TEST_F(TraceStoreTest, SafetensorsHoldTheSameArrays) {
  Fill();
  ExportOptions options;
  options.format = "safetensors";
  const auto files = ExportTraces(TraceReader(store()), folder_.path() / "out", options);
  ExpectTensors(files.at(0), Reference(All(), shape_));
}

TEST_F(SeveralActive, SafetensorsHoldTheActiveExperts) {
  Fill();
  const auto files = ExportTraces(TraceReader(store()), folder_.path() / "out",
                                  {.format = "safetensors"});
  ExpectTensors(files.at(0), Reference(All(), shape_, 2));
}

// Which experts of a token were active is not known where fewer than k are recorded.
TEST_F(SeveralActive, ActiveExpertsThatAreNotRecordedHaveNoArray) {
  shape_.top_k = 0;
  config_ = ConfigOf(shape_, 4, kChunks);
  config_.record = {"ids", "probs", "hidden"};
  config_.geometry.experts_per_token = 2;
  Fill(1);
  const auto files = ExportTraces(TraceReader(store()), folder_.path() / "out",
                                  {.format = "safetensors"});
  EXPECT_EQ(ReadSafetensorsIndex(files.at(0)).Find("decoder_active_ids"), nullptr);
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
    const uint64_t group = expected->second.group_id;
    EXPECT_EQ(json["group_id"], std::to_string(group)) << "beyond a double's 53 bits";
    EXPECT_EQ(json["split"], SplitPartName(SplitOf(group)));
    EXPECT_EQ(json["decoder"]["token_ids"].get<std::vector<uint32_t>>(), s.token_ids);
    EXPECT_EQ(json["decoder"]["expert_ids"][1][0], s.expert_ids[s.num_tokens]);
    EXPECT_EQ(json["decoder"]["gate_probs"][2][0].get<float>(),
              s.gate_probs[2 * s.num_tokens]);
  }
  EXPECT_EQ(expected, all.end());
}

// [L][T][n] of the first n of each element's K.
template <typename T>
Json FirstOf(const std::vector<T>& plane, const RoutingSpan& s, int n) {
  Json layers = Json::array();
  for (int l = 0; l < s.num_layers; ++l) {
    Json tokens = Json::array();
    for (int t = 0; t < s.num_tokens; ++t) {
      const auto from = plane.begin() + (l * s.num_tokens + t) * s.top_k;
      tokens.push_back(std::vector<T>(from, from + n));
    }
    layers.push_back(tokens);
  }
  return layers;
}

TEST_F(SeveralActive, JsonLinesHoldAllExpertsOfAToken) {
  Fill();
  const auto files =
      ExportTraces(TraceReader(store()), folder_.path() / "out", {.format = "jsonl"});
  std::istringstream lines(ReadFile(files.at(0)));
  const auto all = All();
  auto expected = all.begin();
  for (std::string line; std::getline(lines, line); ++expected) {
    const Json json = ParseJson(line, "line");
    ASSERT_NE(expected, all.end());
    for (const RoutingSpan* s : {&expected->second.encoder, &expected->second.decoder}) {
      const Json& of = json[s == &expected->second.encoder ? "encoder" : "decoder"];
      EXPECT_EQ(of["active_ids"], FirstOf(s->topk_ids, *s, 2));
      EXPECT_EQ(of["topk_ids"], FirstOf(s->topk_ids, *s, 4));
      EXPECT_EQ(of["topk_probs"], FirstOf(s->topk_probs, *s, 4));
    }
  }
  EXPECT_EQ(expected, all.end());
}

// Every row, printed by a slow and obvious walk.
std::string CsvOf(const std::map<uint64_t, RoutingTrace>& all, int active) {
  std::string text =
      "sequence_id,document_id,stack,layer,position,token_id,expert_id,gate_prob,dropped,"
      "margin,active_ids,topk_ids,topk_probs,group_id,split\n";
  const auto real = [](float value) {
    char digits[32];
    std::snprintf(digits, sizeof digits, "%.9g", double{value});
    return std::string(digits);
  };
  for (const auto& [id, trace] : all) {
    for (const std::string stack : {"encoder", "decoder"}) {
      const RoutingSpan& s = stack == "encoder" ? trace.encoder : trace.decoder;
      for (int l = 0; l < s.num_layers; ++l) {
        for (int t = 0; t < s.num_tokens; ++t) {
          const int i = l * s.num_tokens + t;
          text += std::to_string(id) + "," + std::to_string(trace.document_id) + "," +
                  stack + "," + std::to_string(l) + "," + std::to_string(t) + "," +
                  std::to_string(s.token_ids[t]) + "," + std::to_string(s.expert_ids[i]) +
                  "," + real(s.gate_probs[i]) + "," + std::to_string(s.dropped[i]) + "," +
                  real(s.margins[i]) + ",";
          std::string active_ids, topk_ids, topk_probs;
          for (int k = 0; k < s.top_k; ++k) {
            const std::string space = k == 0 ? "" : " ";
            const std::string expert = std::to_string(s.topk_ids[i * s.top_k + k]);
            if (active > 1 && k < active) active_ids += space + expert;
            topk_ids += space + expert;
            topk_probs += space + real(s.topk_probs[i * s.top_k + k]);
          }
          text += active_ids + "," + topk_ids + "," + topk_probs + "," +
                  std::to_string(trace.group_id) + "," +
                  SplitPartName(SplitOf(trace.group_id)) + "\n";
        }
      }
    }
  }
  return text;
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
  EXPECT_TRUE(text == CsvOf(All(), 1));  // not printed: megabytes
}

TEST_F(SeveralActive, CsvHoldsAllExpertsOfAToken) {
  Fill();
  const auto files =
      ExportTraces(TraceReader(store()), folder_.path() / "out", {.format = "csv"});
  EXPECT_TRUE(ReadFile(files.at(0)) == CsvOf(All(), 2));
}

// "layer expert tokens" of the decoder's train part, as docs/examples print it.
std::string TrainedExperts(const std::map<uint64_t, RoutingTrace>& all) {
  std::map<std::pair<int, int>, int> counts;
  for (const auto& [id, trace] : all) {
    if (SplitOf(trace.group_id) != SplitPart::kTrain) continue;
    const RoutingSpan& s = trace.decoder;
    for (size_t i = 0; i < s.expert_ids.size(); ++i) {
      ++counts[{static_cast<int>(i) / s.num_tokens, s.expert_ids[i]}];
    }
  }
  std::string lines;
  for (const auto& [place, count] : counts) {
    lines += std::to_string(place.first) + " " + std::to_string(place.second) + " " +
             std::to_string(count) + "\n";
  }
  return lines;
}

class ReadersExample : public TraceStoreTest {
 protected:
  // What the example of this library prints of an export in `format`.
  std::string Printed(const std::string& library, const std::string& format) {
    Fill();
    const auto files =
        ExportTraces(TraceReader(store()), folder_.path() / "out", {.format = format});
    const std::string printed = (folder_.path() / "printed").string();
    EXPECT_EQ(RunReference("../../docs/examples/count_experts_" + library + ".py",
                           files.at(0).string() + " >" + printed),
              0);
    return ReadFile(printed);
  }
};

TEST_F(ReadersExample, OfNumPyCountsWhatIsThere) {
  EXPECT_EQ(Printed("numpy", "npz"), TrainedExperts(All()));
}

TEST_F(ReadersExample, OfPandasCountsWhatIsThere) {
  EXPECT_EQ(Printed("pandas", "csv"), TrainedExperts(All()));
}

// The formula of docs/corpus.md, as docs/examples has it.
TEST_F(TraceStoreTest, TheSplitsExampleGivesEachGroupItsPart) {
  Fill();
  const auto files = ExportTraces(TraceReader(store()), folder_.path() / "out", {});
  const std::string printed = (folder_.path() / "printed").string();
  ASSERT_EQ(RunReference("../../docs/examples/split_numpy.py",
                         files.at(0).string() + " >" + printed),
            0);
  std::map<uint64_t, int> parts;
  for (const auto& [id, trace] : All()) {
    parts[trace.group_id] = static_cast<int>(SplitOf(trace.group_id));
  }
  std::string lines;
  for (const auto& [group, part] : parts) {
    lines += std::to_string(group) + " " + std::to_string(part) + "\n";
  }
  EXPECT_GT(parts.size(), 10u);
  EXPECT_EQ(ReadFile(printed), lines);
}

TEST(LeftOutOfText, IsNamedWhereItIsRecorded) {
  StoreConfig config;
  config.record = {"ids", "probs", "topk"};
  EXPECT_EQ(LeftOutOfText(config), "");
  config.record = {"attention", "hidden", "ids", "output"};
  EXPECT_EQ(LeftOutOfText(config), "router inputs, decoder outputs, attention summaries");
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
