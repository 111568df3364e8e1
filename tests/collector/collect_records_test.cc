// What routecast-collect records and what it refuses: one rank at a time, so that this
// runs beside other tests.
#include <gtest/gtest.h>

#include <cmath>
#include <sstream>

#include "common/errors.h"
#include "common/safetensors.h"
#include "models/next_token_guess.h"
#include "models/routing_window.h"
#include "models/synthetic_checkpoint.h"
#include "storage/shard_db.h"
#include "storage/trace_format.h"
#include "storage/trace_reader.h"
#include "storage/trace_store.h"
#include "tests/collector/collect_fixture.h"

namespace routecast {
namespace {

class CollectRecordsTest : public CollectFixture {};

TEST_F(CollectRecordsTest, RefusesGroupsThatDoNotFit) {
  EXPECT_EQ(Collect(3, "uneven", {"--expert_parallel=2"}), kExitUsage);
  EXPECT_EQ(Collect(1, "uneven", {"--expert_parallel=0"}), kExitUsage);
  EXPECT_FALSE(fs::exists(folder_ / "uneven"));
}

TEST_F(CollectRecordsTest, BatchesHoldLittlePadding) {
  Golden();
  // The sequences have between two and 64 tokens.
  const Json results = ReadJsonFile(folder_ / "golden" / "run.json")["results"];
  EXPECT_GT(results["padding_share"], 0.0);
  EXPECT_LE(results["padding_share"], 0.05);
}

TEST_F(CollectRecordsTest, RecordsWhatTheContractSays) {
  Golden();
  const TraceReader reader(folder_ / "golden");
  EXPECT_TRUE(reader.complete());
  ASSERT_EQ(reader.sequences().size(), 1200u);
  const MoeGeometry g = TinyConfig().geometry();
  EXPECT_EQ(reader.config().geometry, g);
  bool parts[3] = {}, cut = false;
  uint64_t dropped = 0;
  for (const SequenceInfo& s : reader.sequences()) {
    EXPECT_LE(s.encoder_tokens, 64u);
    EXPECT_EQ(s.document_id, s.sequence_id >> 16);
    cut = cut || (s.sequence_id & 0xFFFF) > 0;
    if (s.has_hidden) parts[static_cast<int>(SplitOf(s.group_id))] = true;
    const RoutingTrace t = reader.Read(s.sequence_id, WithHidden::kYes);
    EXPECT_EQ(t.decoder.token_ids[0], 0u);  // start token first
    EXPECT_EQ(t.encoder.token_ids.back(), 1u);
    for (const float margin : t.encoder.margins) EXPECT_GE(margin, 0);
    for (const uint8_t d : t.encoder.dropped) dropped += d;
    EXPECT_EQ(t.encoder.hidden.size(),
              s.has_hidden ? t.encoder.expert_ids.size() * g.d_model : 0);
  }
  EXPECT_TRUE(cut);
  EXPECT_TRUE(parts[0] && parts[1] && parts[2]);
  EXPECT_GT(dropped, 0u);  // capacity is small here
}

// Greedy decoding: the next token is what the recorded head makes of the recorded output.
TEST_F(CollectRecordsTest, HeadAndOutputExplainTheNextToken) {
  ASSERT_EQ(Collect(1, "heads",
                    {"--task=generate", "--max_sequences=24", "--hidden_share=1",
                     "--record=ids,hidden,output"}),
            0);
  const TraceReader reader(folder_ / "heads");
  const int width = reader.config().geometry.d_model;
  const at::Tensor head = ReadVocabularyHead(reader.routers_path(), width);
  ASSERT_TRUE(head.defined());
  int64_t looked = 0, right = 0;
  for (const SequenceInfo& s : reader.sequences()) {
    const RoutingTrace t = reader.Read(s.sequence_id, WithHidden::kYes);
    EXPECT_TRUE(t.encoder.output.empty());
    const at::Tensor output = OutputOf(t);
    ASSERT_TRUE(output.defined());
    ASSERT_EQ(output.size(1), t.decoder.num_tokens);
    const auto [best, ids] = at::matmul(output[0], head.t()).topk(2, -1);
    for (int i = 0; i + 1 < t.decoder.num_tokens; ++i) {
      const double margin = (best[i][0] - best[i][1]).item<double>();
      if (margin < 0.02 * best[i].abs().max().item<double>()) continue;  // bf16 decides
      ++looked;
      right +=
          ids[i][0].item<int64_t>() == t.decoder.token_ids[static_cast<size_t>(i) + 1];
    }
  }
  EXPECT_GT(looked, 50);
  EXPECT_EQ(right, looked);
}

// What is looked at is of the sequence, and recording it changes nothing else; any number
// of ranks records the same bits.
TEST_F(CollectRecordsTest, RecordsWhatTokensLookAt) {
  const std::vector<std::string> flags = {"--max_sequences=60", "--hidden_share=0.5"};
  const auto with = [&](int ranks, const char* name, const char* record) {
    auto all = flags;
    all.push_back(std::string("--record=ids,probs,hidden,output") + record);
    ASSERT_EQ(Collect(ranks, name, all), 0);
  };
  with(1, "attended", ",attention");
  with(2, "attended2", ",attention");
  with(1, "unattended", "");
  const TraceReader reader(folder_ / "attended"), two(folder_ / "attended2"),
      plain(folder_ / "unattended");
  const int heads = TinyConfig().num_heads;
  int looked = 0;
  for (const SequenceInfo& s : reader.sequences()) {
    RoutingTrace t = reader.Read(s.sequence_id, WithHidden::kAttended);
    EXPECT_EQ(t, two.Read(s.sequence_id, WithHidden::kAttended));
    for (const Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
      RoutingSpan& span = stack == Stack::kEncoder ? t.encoder : t.decoder;
      const int kinds = stack == Stack::kEncoder ? 1 : 2;
      EXPECT_EQ(span.attention_heads, s.has_hidden ? heads * kinds : 0);
      EXPECT_TRUE(AttentionFits(span, stack));
      for (size_t i = 0; i < span.attention_entropy.size(); ++i) {
        const bool cross = i % static_cast<size_t>(heads * kinds) >= size_t(heads);
        const int keys = cross ? t.encoder.num_tokens : span.num_tokens;
        EXPECT_GE(span.attention_entropy[i], 0);
        EXPECT_LE(span.attention_entropy[i], 1.01 * std::log(double(keys)));
        const uint16_t* key = &span.attention_keys[i * kStrongestKeys];
        EXPECT_LT(key[0], keys);  // one there always is
        for (int k = 0; k < kStrongestKeys; ++k) {
          EXPECT_TRUE(key[k] < keys || key[k] == kNoKey);
        }
        ++looked;
      }
      // The decoder's first token sees itself alone.
      if (stack == Stack::kDecoder && s.has_hidden) {
        EXPECT_EQ(span.attention_entropy[0], 0);
        EXPECT_EQ(span.attention_keys[0], 0);
        EXPECT_EQ(span.attention_keys[1], kNoKey);
      }
      span.attention_heads = 0;
      span.attention_entropy.clear();
      span.attention_keys.clear();
    }
    EXPECT_EQ(t, plain.Read(s.sequence_id, WithHidden::kYes));
  }
  EXPECT_GT(looked, 1000);
}

TEST_F(CollectRecordsTest, GeneratedTokensHaveTheirAttention) {
  ASSERT_EQ(Collect(1, "stepwise",
                    {"--task=generate", "--max_sequences=24", "--hidden_share=1",
                     "--record=ids,hidden,attention"}),
            0);
  const TraceReader reader(folder_ / "stepwise");
  for (const SequenceInfo& s : reader.sequences()) {
    const RoutingTrace t = reader.Read(s.sequence_id, WithHidden::kAttended);
    EXPECT_EQ(t.decoder.attention_entropy.size(),
              t.decoder.expert_ids.size() * size_t(2 * TinyConfig().num_heads));
  }
}

// The recorded choice is the argmax of the recorded router on the recorded input: the
// stale gate at distance 0.
TEST_F(CollectRecordsTest, RoutersExplainTheChoice) {
  Golden();
  const TraceReader reader(folder_ / "golden");
  const SafetensorsIndex index = ReadSafetensorsIndex(reader.routers_path());
  const MoeGeometry g = reader.config().geometry;
  int64_t looked = 0, right = 0;
  for (const SequenceInfo& s : reader.sequences()) {
    if (!s.has_hidden) continue;
    const RoutingTrace t = reader.Read(s.sequence_id, WithHidden::kYes);
    for (int layer = 0; layer < g.num_layers(); ++layer) {
      const RoutingSpan& span =
          g.StackOf(layer) == Stack::kEncoder ? t.encoder : t.decoder;
      std::string bytes =
          ReadTensorBytes(reader.routers_path(),
                          *index.Find("layer." + std::to_string(layer) + ".weight"));
      const at::Tensor weight =
          at::from_blob(bytes.data(), {g.num_experts, g.d_model}, at::kFloat);
      const int64_t at = int64_t{g.LayerInStack(layer)} * span.num_tokens;
      std::vector<float> input;
      for (int64_t i = 0; i < int64_t{span.num_tokens} * g.d_model; ++i) {
        input.push_back(Bf16ToFloat(span.hidden[at * g.d_model + i]));
      }
      const at::Tensor x =
          at::from_blob(input.data(), {span.num_tokens, g.d_model}, at::kFloat);
      const at::Tensor choice = at::matmul(x, weight.t()).argmax(-1);
      for (int64_t i = 0; i < span.num_tokens; ++i) {
        if (span.margins[at + i] < 0.05f)
          continue;  // rounding of the stored input decides
        ++looked;
        right += choice[i].item<int64_t>() == span.expert_ids[at + i];
      }
    }
  }
  EXPECT_GT(looked, 1000);
  EXPECT_EQ(right, looked);
}

TEST_F(CollectRecordsTest, RefusesToGoOnWithSomethingElse) {
  Golden();
  EXPECT_EQ(Collect(1, "golden", {"--threads=2"}), kExitUsage);
  EXPECT_EQ(Collect(1, "golden", {"--dtype=bf16"}), kExitUsage);
  EXPECT_EQ(Collect(1, "golden", {"--model=" + (folder_ / "other").string()}),
            kExitUsage);
  EXPECT_EQ(Collect(2, "golden", {"--max_sequences=1199"}), kExitUsage);
}

// As what refuses the store says: the same command computes the lost chunks anew.
TEST_F(CollectRecordsTest, ALostTableOfRouterInputsComesBack) {
  ASSERT_EQ(Collect(1, "lost"), 0);
  fs::path lost;
  {
    const ShardDb shard(folder_ / "lost", 1, TraceStore::Open(folder_ / "lost"),
                        ShardDb::Mode::kRead);
    std::vector<rocksdb::LiveFileMetaData> files;
    shard.db()->GetLiveFilesMetaData(&files);
    for (const auto& file : files) {
      if (file.column_family_name == "hidden") lost = file.db_path + file.name;
    }
  }
  ASSERT_TRUE(fs::remove(lost));
  const std::vector<std::string> verify = {Bin("routecast-trace"), "verify", "--quiet",
                                           "--store=" + (folder_ / "lost").string()};
  EXPECT_EQ(RunProgram(verify), kExitBadData);
  EXPECT_EQ(Collect(1, "lost"), 0);
  EXPECT_EQ(RunProgram(verify), 0);
  EXPECT_TRUE(Export("lost") == Golden());
}

TEST_F(CollectRecordsTest, DryRunWritesNothing) {
  EXPECT_EQ(Collect(1, "dry", {"--dry_run"}), 0);
  EXPECT_FALSE(fs::exists(folder_ / "dry"));
}

// What the program prints.
std::string Printed(const std::vector<std::string>& command, bool errors_too = false) {
  std::string line;
  for (const std::string& word : command) line += "'" + word + "' ";
  if (errors_too) line += "2>&1";
  FILE* out = ::popen(line.c_str(), "r");
  std::string text;
  for (int c = 0; (c = std::fgetc(out)) != EOF;) text += static_cast<char>(c);
  EXPECT_EQ(::pclose(out), 0) << line;
  return text;
}

// The command with `data` as its one source.
std::vector<std::string> OnlyData(std::vector<std::string> command,
                                  const std::string& data) {
  std::erase_if(command, [&](const std::string& word) {
    return word.starts_with("--data=") && word != data;
  });
  return command;
}

TEST_F(CollectRecordsTest, DryRunNamesTheBytesOfRouterInputs) {
  const std::string plan = Printed(Program("dry", {"--dry_run"}));
  EXPECT_NE(plan.find("20 % of the document groups: "
                      "128 bytes a token of the encoder (2 layers x 32 x 2), "
                      "192 bytes a token of the decoder (2 layers x 32 x 2 and what"),
            std::string::npos)
      << plan;
  EXPECT_EQ(Printed(Program("dry", {"--dry_run", "--record=ids"})).find("inputs"),
            std::string::npos);
}

// Of a plan: how much is to be written.
double SaidBytes(const std::string& plan) {
  const std::string about = ": about ";
  std::istringstream said(plan.substr(plan.find(about) + about.size()));
  double number = 0;
  std::string unit;
  said >> number >> unit;
  EXPECT_TRUE(unit == "MiB;" || unit == "KiB;") << plan;
  return number * (unit == "MiB;" ? 1 << 20 : 1 << 10);
}

TEST_F(CollectRecordsTest, DryRunOfAnImportCountsAttention) {
  const auto planned = [](const std::string& store, const std::string& record) {
    EXPECT_EQ(Collect(1, store, {"--max_sequences=24", "--hidden_share=1", record}), 0);
    Export(store);
    return SaidBytes(Printed({Bin("routecast-trace"), "import", "--dry_run",
                              "--in=" + (folder_ / ("export-" + store)).string(),
                              "--out=" + (folder_ / "imported").string()}));
  };
  EXPECT_GT(planned("with-heads", "--record=ids,hidden,attention"),
            1.2 * planned("without-heads", "--record=ids,hidden"));
}

// One document: its group is drawn or forced, so all of the text has router inputs.
TEST_F(CollectRecordsTest, DryRunEstimatesAStoreOfFewDocuments) {
  WriteFileAtomic(folder_ / "long.txt", RandomText(9, 20'000));
  const std::string data = "--data=text:" + (folder_ / "long.txt").string();
  for (const std::string task : {"encode", "denoise"}) {
    SCOPED_TRACE(task);
    const std::string name = "few-" + task;
    const std::vector<std::string> more = {data, "--task=" + task, "--hidden_share=0.1",
                                           "--max_sequences=100"};
    const std::vector<std::string> command = OnlyData(Program(name, more), data);
    std::vector<std::string> dry = command;
    dry.push_back("--dry_run");
    const std::string plan = Printed(dry);
    ASSERT_EQ(RunProgram(UnderMpirun(1, command)), 0);
    double bytes = 0;
    for (const auto& file : fs::recursive_directory_iterator(folder_ / name)) {
      if (file.path().extension() == ".sst") bytes += double(file.file_size());
    }
    const double estimate = SaidBytes(plan);
    EXPECT_GT(estimate, 0.8 * bytes) << plan;
    EXPECT_LT(estimate, 1.3 * bytes) << plan;
  }
}

TEST_F(CollectRecordsTest, DryRunKnowsWhatTheStoreHasAlready) {
  Golden();
  const int64_t chunks = ReadJsonFile(folder_ / "golden" / "store.json")["num_chunks"];
  const std::string plan = Printed(Program("golden", {"--dry_run"}));
  EXPECT_NE(plan.find("the store has " + std::to_string(chunks) + " chunks"),
            std::string::npos)
      << plan;
}

TEST_F(CollectRecordsTest, DryRunRefusesAStoreThatCannotBeMade) {
  EXPECT_EQ(RunProgram(Program("corpus.jsonl/store", {"--dry_run"})), kExitUsage);
}

// Weights may take minutes to read; here they would be seen in the memory they take.
TEST_F(CollectRecordsTest, AMissingTextIsToldBeforeWeightsAreRead) {
  const fs::path heavy = folder_ / "heavy";
  MakeFolder(heavy);
  SwitchConfig config = TinyConfig();
  config.d_model = 512;
  config.d_ff = 2048;
  WriteSyntheticCheckpoint(heavy, {config, at::kBFloat16, 1});
  for (const char* file : {"spiece.model", "tokenizer_config.json"})
    fs::copy_file(folder_ / "model" / file, heavy / file);
  const auto peak_bytes = [](const std::string& model) {
    EXPECT_EQ(Collect(1, "of-" + model,
                      {"--model=" + (folder_ / model).string(),
                       "--data=text:" + (folder_ / "nowhere.txt").string()}),
              kExitUsage);
    return ReadJsonFile(folder_ / ("of-" + model) / "run.json")["peak_memory_bytes"]
        .get<int64_t>();
  };
  const int64_t light = peak_bytes("model");
  EXPECT_LT(peak_bytes("heavy"), light + (int64_t{64} << 20));
}

TEST_F(CollectRecordsTest, MoreThanAllExpertsAreSaid) {
  const auto said = [](const char* top_k) {
    return Printed(Program("dry", {"--noquiet", "--dry_run", "--record=ids,topk", top_k}),
                   true);
  };
  EXPECT_NE(said("--top_k=64").find("--top_k=64: the model has 8 experts"),
            std::string::npos);
  EXPECT_EQ(said("--top_k=8").find("--top_k"), std::string::npos);
}

TEST_F(CollectRecordsTest, DroppedAndReplacedTextIsSaidAndKept) {
  MakeFolder(folder_ / "mixed");
  WriteFileAtomic(folder_ / "mixed" / "a.bin", std::string(500, '\0'));
  WriteFileAtomic(folder_ / "mixed" / "b.txt", RandomText(1, 100) + "\xff and \xfe");
  const std::string data = "--data=text:" + (folder_ / "mixed").string();
  const std::string said = Printed(
      OnlyData(Program("mixed-store", {"--noquiet", data, "--max_sequences=0"}), data),
      true);
  EXPECT_NE(said.find("1 binary ones dropped, 2 bytes were not UTF-8"), std::string::npos)
      << said;
  const Json corpus = ReadJsonFile(folder_ / "mixed-store" / "run.json")["corpus"];
  EXPECT_EQ(corpus["binary_documents"], 1);
  EXPECT_EQ(corpus["replaced_bytes"], 2);
}

TEST_F(CollectRecordsTest, FilesOfOtherNamesAreKeptInItsRecordAndNamedAsACause) {
  const fs::path texts = folder_ / "named";
  MakeFolder(texts);
  fs::copy_file(folder_ / "corpus.jsonl", texts / "a.jsonl");
  WriteFileAtomic(texts / "part-0001", "{\"text\": \"one more\"}\n");
  const std::string data = "--data=jsonl:" + texts.string() + "#text";
  const auto command =
      OnlyData(Program("named-store", {data, "--max_sequences=20"}), data);
  ASSERT_EQ(RunProgram(command), 0);
  const Json corpus = ReadJsonFile(folder_ / "named-store" / "run.json")["corpus"];
  EXPECT_EQ(corpus.value("skipped_files", 0), 1);
  EXPECT_EQ(corpus.value("first_skipped_file", ""), (texts / "part-0001").string());
  fs::rename(texts / "part-0001", texts / "part-0001.jsonl");
  const fs::path errors = folder_ / "named-errors";
  EXPECT_EQ(Wait(Start(command, errors)), kExitUsage);
  EXPECT_NE(ReadFile(errors).find("are taken by their names"), std::string::npos);
}

TEST_F(CollectRecordsTest, SamplingFlagsThatDoNothingAreRefused) {
  EXPECT_EQ(Collect(1, "none", {"--temperature=1"}), kExitUsage);  // denoise
  EXPECT_EQ(Collect(1, "none", {"--task=encode", "--noise_density=0.3"}), kExitUsage);
  EXPECT_EQ(Collect(1, "none", {"--record=ids,output"}), kExitUsage);
  EXPECT_EQ(Collect(1, "none", {"--record=ids,attention"}), kExitUsage);
  EXPECT_EQ(Collect(1, "none", {"--record=ids,hidden,attention", "--max_length=70000"}),
            kExitUsage);
  EXPECT_EQ(Collect(1, "none", {"--task=generate", "--top_p=0.9"}), kExitUsage);
  EXPECT_EQ(Collect(1, "none", {"--task=generate", "--temperature=-1"}), kExitUsage);
  EXPECT_FALSE(fs::exists(folder_ / "none"));
}

}  // namespace
}  // namespace routecast
