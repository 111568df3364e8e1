// The program's work from a store and a checkpoint on disk to results.json and
// report.html.
#include "evaluator/evaluation.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <set>

#include "common/errors.h"
#include "evaluator/evaluation_setup.h"
#include "evaluator/predictor_set.h"
#include "gtest/gtest.h"
#include "storage/trace_reader.h"
#include "tests/evaluator/evaluation_fixture.h"
#include "tests/support/reference.h"

namespace routecast {
namespace {

TEST_F(EvaluationTest, ReplayWritesResultsAndReport) {
  EvaluationOptions options = Options();
  options.out = folder_ / "replay";
  ValidateEvaluation(options);
  Evaluate(options, Json::object());
  const Json results = ReadJsonFile(options.out / "results.json");
  ASSERT_GE(results["rows"].size(),
            6u);  // uncached, LRU, counting predictors, oracle, resident
  for (const Json& row : results["rows"]) {
    EXPECT_TRUE(row["lossless"].get<bool>());
    EXPECT_TRUE(row["synthetic_weights"].get<bool>());
    EXPECT_EQ(row["phase"], "decoder");
  }
  EXPECT_EQ(ReadJsonFile(options.out / "run.json")["exit_status"], 0);
  EXPECT_GT(fs::file_size(options.out / "report.html"), 1000u);
  const std::string csv = ReadFile(options.out / "rows.csv", 1 << 20);
  EXPECT_EQ(std::count(csv.begin(), csv.end(), '\n'),
            static_cast<long>(results["rows"].size()) + 1);
}

TEST_F(EvaluationTest, EveryPolicyHasItsRowAndTheSameBits) {
  EvaluationOptions options = Options();
  options.policies = {"all"};
  options.predictor = {"frequency"};
  options.baselines = "none";
  options.out = folder_ / "policies";
  ValidateEvaluation(options);
  Evaluate(options, Json::object());
  std::multiset<std::string> policies;
  std::set<std::string> outputs;
  const Json results = ReadJsonFile(options.out / "results.json");
  for (const Json& row : results["rows"]) {
    outputs.insert(row["output_sha256"].get<std::string>());
    if (row["predictor"] == "frequency") policies.insert(row["policy"]);
  }
  EXPECT_EQ(policies, (std::multiset<std::string>{"adaptive_top_k", "auto", "confident",
                                                  "intelligent", "memory_manager",
                                                  "multi_look", "top_k"}));
  EXPECT_EQ(outputs.size(), 1u);
  const std::string table = ReadFile(options.out / "table.txt", 1 << 20);
  EXPECT_NE(table.find("fastest within the budget (decoder): "), std::string::npos);
}

TEST_F(EvaluationTest, FrequentIdsAreThoseOfTheTrainPart) {
  const TraceReader reader(folder_ / "store");
  std::map<int64_t, int> said;
  for (const SequenceInfo& info : reader.sequences()) {
    if (SplitOf(info.group_id) != SplitPart::kTrain) continue;
    for (uint32_t id : reader.Read(info.sequence_id, WithHidden::kNo).decoder.token_ids)
      ++said[id];
  }
  const std::vector<int64_t> ids = FrequentIds(reader, 96, 7);
  ASSERT_EQ(ids.size(), 7u);
  EXPECT_EQ(std::set<int64_t>(ids.begin(), ids.end()).size(), 7u);
  EXPECT_GT(said[ids[0]], 0);
  for (size_t i = 1; i < ids.size(); ++i) EXPECT_LE(said[ids[i]], said[ids[i - 1]]);
  int more = 0;  // ids that are said more often than the last one that is named
  for (const auto& [id, times] : said) more += times > said[ids.back()];
  EXPECT_LT(more, 7);
  EXPECT_TRUE(FrequentIds(reader, 96, 96).empty());
}

// Routers and a vocabulary head that know nothing of the traces.
void WriteRouters(const fs::path& store, const MoeGeometry& g) {
  at::manual_seed(3);
  Parameters all;
  for (int l = 0; l < g.num_layers(); ++l) {
    const std::string name = "layer." + std::to_string(l) + ".";
    all.Add(name + "weight", at::randn({g.num_experts, g.d_model}));
    all.Add(name + "norm_gain", at::ones({g.d_model}));
  }
  all.Add("vocabulary_head", at::randn({90, g.d_model}));
  WriteParameters(store / "routers.safetensors", all, at::ScalarType::Undefined);
}

// Guesses that are mostly wrong, asked about a whole pass early: another way through
// every row, and the same bits.
TEST_F(EvaluationTest, AReplayGuessesTheNextTokenWhereTheStoreHasItsHead) {
  EvaluationOptions options = Options();
  options.store = folder_ / "with-head";
  WriteSyntheticStore(options.store, SmallConfig());
  WriteRouters(options.store, SmallConfig().geometry());
  std::set<std::string> outputs;
  for (const bool guess : {true, false}) {
    options.guess_next_token = guess;
    options.out = folder_ / (guess ? "guessed" : "not-guessed");
    ValidateEvaluation(options);
    Evaluate(options, Json::object());
    const Json results = ReadJsonFile(options.out / "results.json");
    for (const Json& row : results["rows"]) {
      EXPECT_TRUE(row["lossless"].get<bool>());
      outputs.insert(row["output_sha256"].get<std::string>());
    }
    const std::string record = ReadJsonFile(options.out / "run.json").dump();
    EXPECT_EQ(record.find("next token is guessed") != std::string::npos, guess);
  }
  EXPECT_EQ(outputs.size(), 1u);
}

TEST_F(EvaluationTest, GenerateComparesBothStacks) {
  EvaluationOptions options = Options();
  options.model = folder_ / "model";
  options.batches = {2};
  options.out = folder_ / "generate";
  ValidateEvaluation(options);
  Evaluate(options, Json::object());
  const Json results = ReadJsonFile(options.out / "results.json");
  int encoder = 0, decoder = 0;
  std::string hash;
  for (const Json& row : results["rows"]) {
    (row["phase"] == "encoder" ? encoder : decoder) += 1;
    EXPECT_FALSE(row["synthetic_weights"].get<bool>());
    if (hash.empty()) hash = row["output_sha256"];
    EXPECT_EQ(row["output_sha256"], hash);
  }
  EXPECT_EQ(encoder, decoder);
  EXPECT_GE(encoder, 6);
}

// Rows of every batch size and both schedules, labelled; outputs are equal within one.
TEST_F(EvaluationTest, EveryBatchAndScheduleHasItsRows) {
  EvaluationOptions options = Options();
  options.batches = {1, 2};
  options.schedules = {"in_order", "by_route"};
  options.baselines = "none";
  options.link = "native";
  options.rounds = 1;
  options.out = folder_ / "batches";
  ValidateEvaluation(options);
  Evaluate(options, Json::object());
  const Json results = ReadJsonFile(options.out / "results.json");
  std::map<std::string, std::set<std::string>> hashes;
  for (const Json& row : results["rows"]) {
    EXPECT_EQ(row["prompts"], "store");
    hashes[std::to_string(row["batch"].get<int>()) + row["schedule"].get<std::string>()]
        .insert(row["output_sha256"].get<std::string>());
  }
  ASSERT_EQ(hashes.size(), 3u);  // batches of one hold nothing to group
  for (const char* group : {"1in_order", "2in_order", "2by_route"}) {
    EXPECT_EQ(hashes[group].size(), 1u) << group;
  }
}

// The same requests under several budgets: other rows, one output.
TEST_F(EvaluationTest, EveryBudgetHasItsRows) {
  EvaluationOptions options = Options();
  options.budgets = {"50%", "75%"};
  options.baselines = "none";
  options.link = "native";
  options.rounds = 1;
  options.out = folder_ / "budgets";
  ValidateEvaluation(options);
  Evaluate(options, Json::object());
  std::map<std::string, std::set<uint64_t>> bytes;
  std::set<std::string> hashes;
  const Json results = ReadJsonFile(options.out / "results.json");
  for (const Json& row : results["rows"]) {
    if (row["policy"] != "resident")
      bytes[row["budget"]].insert(row["budget_bytes"].get<uint64_t>());
    hashes.insert(row["output_sha256"].get<std::string>());
  }
  ASSERT_EQ(bytes["50%"].size(), 1u);
  ASSERT_EQ(bytes["75%"].size(), 1u);
  EXPECT_LT(*bytes["50%"].begin(), *bytes["75%"].begin());
  EXPECT_EQ(hashes.size(), 1u);
}

TEST_F(EvaluationTest, EverySourceOfPromptsHasItsRows) {
  EvaluationOptions options = Options();
  options.store.clear();
  options.model =
      fs::path(EnvOr("ROUTECAST_SOURCE_DIR", ".")) / "configs/checkpoints/small-16";
  for (const char* name : {"a.txt", "b.txt"}) {
    WriteFileAtomic(folder_ / name, std::string("text of ") + name + "\nmore of it\n");
    options.prompts.push_back(folder_ / name);
  }
  options.link = "native";
  options.rounds = 1;
  options.out = folder_ / "sources";
  ValidateEvaluation(options);
  Evaluate(options, Json::object());
  std::set<std::string> sources;
  const Json results = ReadJsonFile(options.out / "results.json");
  for (const Json& row : results["rows"]) sources.insert(row["prompts"]);
  EXPECT_EQ(sources, (std::set<std::string>{"a.txt", "b.txt"}));
}

TEST_F(EvaluationTest, ATierSaysTheBudget) {
  EvaluationOptions options = Options();
  options.baselines = "none";
  options.link = "native";
  options.rounds = 1;
  options.budget_given = false;
  options.tier = "host:98304,disk";  // six experts of 16 KiB
  options.out = folder_ / "tier";
  ValidateEvaluation(options);
  Evaluate(options, Json::object());
  const Json results = ReadJsonFile(options.out / "results.json");
  EXPECT_EQ(results["rows"][0]["budget_bytes"], 98304);
  options.budget_given = true;  // 25 % is another size
  EXPECT_THROW(Evaluate(options, Json::object()), UsageError);
  options.budgets = {"98304"};
  EXPECT_NO_THROW(ValidateEvaluation(options));
  options.budgets = {"98305"};
  EXPECT_THROW(ValidateEvaluation(options), UsageError);
}

// One more round of every row, for Perfetto.
TEST_F(EvaluationTest, ATimelineShowsEveryRow) {
  EvaluationOptions options = Options();
  options.out = folder_ / "drawn";
  options.baselines = "simple";
  options.timeline = true;
  ValidateEvaluation(options);
  Evaluate(options, Json::object());
  const Json timeline = ReadJsonFile(options.out / "timeline.json");
  std::map<int, std::string> processes;
  std::map<int, std::set<std::string>> tracks;
  for (const Json& e : timeline["traceEvents"]) {
    if (e["name"] == "process_name") processes[e["pid"]] = e["args"]["name"];
    if (e.contains("cat")) tracks[e["pid"]].insert(e["cat"].get<std::string>());
  }
  EXPECT_EQ(processes.size(), ReadJsonFile(options.out / "results.json")["rows"].size());
  for (const auto& [process, name] : processes) {
    EXPECT_TRUE(tracks[process].count("model")) << name;
    EXPECT_EQ(tracks[process].count("link"), name.find("resident") == std::string::npos)
        << name;
  }
}

TEST_F(EvaluationTest, EveryBaselineHasARowUnlessFewerAreAskedFor) {
  EvaluationOptions options = Options();
  const auto predictors = [&](const char* baselines) {
    options.baselines = baselines;
    options.out = folder_ / (std::string("rows_") + baselines);
    Evaluate(options, Json::object());
    std::set<std::string> names;
    const Json results = ReadJsonFile(options.out / "results.json");
    for (const Json& row : results["rows"]) {
      names.insert(row["predictor"].get<std::string>());
    }
    return names;
  };
  const auto all = predictors("all");
  for (const char* name : {"frequency", "token_table", "markov", "previous_token",
                           "layer_minus_1", "multi_layer", "pattern", "adaptive"}) {
    EXPECT_TRUE(all.count(name)) << name;
  }
  EXPECT_EQ(predictors("none"), (std::set<std::string>{"none", "oracle"}));
}

TEST_F(EvaluationTest, DryRunWritesNothing) {
  EvaluationOptions options = Options();
  options.dry_run = true;
  options.out = folder_ / "dry";
  options.cache = folder_ / "dry_cache";
  Evaluate(options, Json::object());
  EXPECT_FALSE(fs::exists(options.out));
  EXPECT_FALSE(fs::exists(options.cache));
}

TEST_F(EvaluationTest, AWarmStartCountsAStoreOrATable) {
  EvaluationOptions options = Options();
  options.baselines = "none";
  const TraceReader reader(folder_ / "store");
  const MoeGeometry g = reader.config().geometry;
  std::string table = "layer_id,expert_id,count\n";
  for (int i = 0; i < g.num_keys(); ++i) {
    const ExpertKey key = ExpertKey::FromIndex(i, g);
    table += std::to_string(key.layer) + "," + std::to_string(key.expert) + ",1\n";
  }
  WriteFileAtomic(folder_ / "load.csv", table);
  for (const std::string& from : {std::string("auto"), (folder_ / "store").string(),
                                  (folder_ / "load.csv").string()}) {
    options.warm_start = from;
    options.out = folder_ / ("warm_" + std::to_string(from.size()));
    ValidateEvaluation(options);
    Evaluate(options, Json::object());
    const Json results = ReadJsonFile(options.out / "results.json");
    int filled = 0;
    for (const Json& row : results["rows"]) filled += row.contains("warm_start_bytes");
    EXPECT_EQ(filled, 2) << from;  // on demand with LRU, the oracle
  }
}

// Caches and what learns while it serves know them then.
TEST_F(EvaluationTest, RequestsThatComeAgainAreNoted) {
  EvaluationOptions options = Options();
  options.compare = false;
  const auto noted = [&] {
    const Json headline = Evaluate(options, Json::object());
    for (const Json& note : headline["notes"]) {
      if (note.get<std::string>().find("they come again") != std::string::npos)
        return true;
    }
    return false;
  };
  EXPECT_FALSE(noted());
  options.rounds = 60;  // more than the store has test sequences
  options.max_new_tokens = 1;
  EXPECT_TRUE(noted());
}

}  // namespace
}  // namespace routecast
