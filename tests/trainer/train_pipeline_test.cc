// routecast-train as people run it: on a store that routecast-collect made, under mpirun,
// stopped by a signal, killed, started again.
#include <gtest/gtest.h>

#include <algorithm>

#include "common/errors.h"
#include "tests/support/process.h"
#include "tests/support/tiny_checkpoint.h"

namespace routecast {
namespace {

class TrainPipeline : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = TestFolder("train");
    WriteCheckpoint(folder_ / "model", 1);
    WriteCorpus(folder_, 600);
    ASSERT_EQ(
        RunProgram({Bin("routecast-collect"), "--quiet", "--threads=1", "--device=cpu",
                    "--num_shards=2", "--max_length=48", "--max_sequences=400",
                    "--hidden_share=1", "--record=ids,probs,topk,hidden,attention",
                    "--model=" + (folder_ / "model").string(), Data(),
                    "--cache=" + (folder_ / "cache").string(),
                    "--store=" + (folder_ / "store").string()}),
        0);
  }
  static std::string Data() {
    return "--data=jsonl:" + (folder_ / "corpus.jsonl").string() + "#text";
  }
  static std::vector<std::string> Command(const std::string& out) {
    return UnderMpirun(
        2,
        {Bin("routecast-train"), "--quiet", "--threads=1", "--device=cpu",
         "--kind=hidden", "--steps=120", "--validate_every=20", "--global_batch=16",
         "--micro_batch=8", "--validation_sequences=16", "--test_sequences=32",
         "--store=" + (folder_ / "store").string(), "--out=" + (folder_ / out).string()});
  }
  // Made once, by a run that nobody disturbed.
  static const Json& Golden() {
    static const Json golden = [] {
      EXPECT_EQ(RunProgram(Command("golden")), 0);
      return ReadJsonFile(folder_ / "golden" / "results.json");
    }();
    return golden;
  }
  static inline fs::path folder_;
};

TEST_F(TrainPipeline, ScoresEveryLayerAndLeadBesideItsBaselines) {
  // 2 + 2 MoE layers: encoder sources -1, 0 with 2 + 1 leads; decoder sources -1, 0, 1
  // with two leads each, the last of which ask for the next token.
  EXPECT_EQ(Golden()["scores"].size(), 3u + 6u);
  for (const auto& [name, entries] : Golden()["baselines"].items()) {
    EXPECT_FALSE(entries.empty()) << name;
  }
  EXPECT_TRUE(Golden()["baselines"].contains("stale_gate"));
  EXPECT_EQ(ReadJsonFile(folder_ / "golden" / "run.json")["exit_status"], 0);
}

TEST_F(TrainPipeline, ASignalSavesAndTheRunGoesOnToTheSameScores) {
  ASSERT_EQ(Interrupt(Command("stopped"), folder_ / "stopped" / "metrics.jsonl", SIGUSR1,
                      kExitStopped, [] { fs::remove_all(folder_ / "stopped"); }),
            kExitStopped);
  EXPECT_EQ(ReadJsonFile(folder_ / "stopped" / "run.json")["exit_status"], kExitStopped);
  ASSERT_EQ(RunProgram(Command("stopped")), 0);
  EXPECT_EQ(ReadJsonFile(folder_ / "stopped" / "results.json"), Golden());
}

TEST_F(TrainPipeline, KilledItGoesOnToTheSameScores) {
  EXPECT_EQ(Interrupt(Command("killed"), folder_ / "killed" / "metrics.jsonl", SIGKILL,
                      128 + SIGKILL, [] { fs::remove_all(folder_ / "killed"); }),
            128 + SIGKILL);
  ASSERT_EQ(RunProgram(Command("killed")), 0);
  EXPECT_EQ(ReadJsonFile(folder_ / "killed" / "results.json"), Golden());
}

// Equal documents of equal lengths, routed by a model of equal shape: still another run.
TEST_F(TrainPipeline, AStoreOfAnotherModelIsNotGoneOnWith) {
  WriteCheckpoint(folder_ / "other-model", 2);
  const auto collect = [](const std::string& model, const std::string& store) {
    return RunProgram({Bin("routecast-collect"), "--quiet", "--threads=1", "--device=cpu",
                       "--num_shards=2", "--max_length=48", "--max_sequences=60",
                       "--model=" + (folder_ / model).string(), Data(),
                       "--cache=" + (folder_ / "cache").string(),
                       "--store=" + (folder_ / store).string()});
  };
  ASSERT_EQ(collect("model", "ids"), 0);
  ASSERT_EQ(collect("other-model", "other-ids"), 0);
  const auto train = [](const std::string& store, const std::string& stop) {
    return RunProgram({Bin("routecast-train"), "--quiet", "--threads=1", "--device=cpu",
                       "--kind=interlayer", "--width=16", "--layers=1", "--steps=4",
                       "--validation_sequences=4", "--test_sequences=4", stop,
                       "--store=" + (folder_ / store).string(),
                       "--out=" + (folder_ / "two-models").string()});
  };
  ASSERT_EQ(train("ids", "--stop_after=2"), kExitStopped);
  EXPECT_EQ(train("other-ids", "--stop_after=3"), 2);
  EXPECT_EQ(train("ids", "--stop_after=0"), 0);
}

// A rank that is stopped, not dead: the others' deadline ends the job, its number is
// said, and the run goes on to the same scores.
TEST_F(TrainPipeline, AHungRankIsNamedAndTheRunGoesOn) {
  const fs::path out = folder_ / "hung", script = folder_ / "hang.sh";
  WriteFileAtomic(script,
                  "if [ \"$OMPI_COMM_WORLD_RANK\" = 1 ]; then\n"
                  "  (until [ -e " +
                      (out / "state").string() +
                      " ]; do sleep 0.02; done; kill -STOP $$) &\n"
                      "fi\nexec \"$@\"\n");
  auto command = Command("hung");
  const auto program = std::find(command.begin(), command.end(), Bin("routecast-train"));
  command.insert(command.insert(program, script.string()), "bash");
  std::string line;
  for (const std::string& word : command) line += "'" + word + "' ";
  line += "--collective_deadline=2 2> '" + (folder_ / "hung.err").string() + "'";
  const auto start = std::chrono::steady_clock::now();
  EXPECT_NE(RunProgram({"bash", "-c", line}), 0);
  WaitForOrphans();
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(60));
  const std::string error = ReadFile(folder_ / "hung.err");
  EXPECT_NE(error.find("rank 1 did not come to it and does not answer"),
            std::string::npos)
      << error;
  EXPECT_FALSE(ReadFile(out / "watchdog" / "rank-0.jsonl").empty());
  ASSERT_EQ(RunProgram(Command("hung")), 0);
  EXPECT_EQ(ReadJsonFile(out / "results.json"), Golden());
}

TEST_F(TrainPipeline, EveryConfigurationThatIsShippedFitsTheProgram) {
  int count = 0;
  for (const auto& entry : fs::directory_iterator(
           fs::path(EnvOr("ROUTECAST_SOURCE_DIR", ".")) / "configs/speculation")) {
    EXPECT_EQ(RunProgram({Bin("routecast-train"), "--quiet", "--dry_run",
                          "--flagfile=" + entry.path().string(),
                          "--store=" + (folder_ / "store").string(),
                          "--out=" + (folder_ / "dry").string()}),
              0)
        << entry.path();
    ++count;
  }
  EXPECT_GE(count, 9);
  EXPECT_FALSE(fs::exists(folder_ / "dry"));
}

// From the records of the store to a model that says what it was made of.
TEST_F(TrainPipeline, AttentionSummariesAreAnInputWhereTheyAreAskedFor) {
  std::vector<std::string> command = {Bin("routecast-train"),
                                      "--quiet",
                                      "--threads=1",
                                      "--device=cpu",
                                      "--attention_inputs",
                                      "--steps=4",
                                      "--global_batch=16",
                                      "--micro_batch=8",
                                      "--validation_sequences=8",
                                      "--store=" + (folder_ / "store").string(),
                                      "--out=" + (folder_ / "attention").string()};
  ASSERT_EQ(RunProgram(UnderMpirun(2, command)), 0);
  const Json config = ReadJsonFile(folder_ / "attention" / "config.json");
  EXPECT_EQ(config["config"]["attention_heads"],
            ReadJsonFile(folder_ / "store" / "store.json")["attention_heads"]);
  command.push_back("--kind=interlayer");
  EXPECT_EQ(RunProgram(command), kExitUsage);
}

TEST_F(TrainPipeline, SeveralStoresAreOneTraining) {
  std::vector<std::string> command = {Bin("routecast-train"),
                                      "--quiet",
                                      "--threads=1",
                                      "--device=cpu",
                                      "--kind=interlayer",
                                      "--masked_ids=0.15",
                                      "--steps=4",
                                      "--global_batch=16",
                                      "--micro_batch=8",
                                      "--validation_sequences=8",
                                      "--store=" + (folder_ / "store").string(),
                                      "--also=" + (folder_ / "store").string(),
                                      "--out=" + (folder_ / "joint").string()};
  ASSERT_EQ(RunProgram(UnderMpirun(2, command)), 0);
  EXPECT_EQ(ReadJsonFile(folder_ / "joint" / "results.json")["also"].size(), 1u);
  EXPECT_TRUE(fs::exists(folder_ / "joint" / "also-1" / "model.safetensors"));
  command.push_back("--leaderboard=interlayer");
  EXPECT_EQ(RunProgram(command), kExitUsage);
}

// Two ranks, four trials of their own each way, and a flag file for the run to come.
TEST_F(TrainPipeline, ASearchIsOneCommand) {
  const fs::path out = folder_ / "search", space = folder_ / "space.json";
  WriteFileAtomic(space, R"({"trials": 4, "factor": 2, "rungs": 2,
                             "space": {"learning_rate": {"log": [1e-4, 1e-2]}}})");
  std::vector<std::string> command = {Bin("routecast-train"),
                                      "--quiet",
                                      "--threads=1",
                                      "--device=cpu",
                                      "--global_batch=16",
                                      "--micro_batch=8",
                                      "--validation_sequences=16",
                                      "--store=" + (folder_ / "store").string()};
  std::vector<std::string> search = command;
  for (const std::string& flag :
       {std::string("--kind=simple"), std::string("--steps=8"),
        "--search=" + space.string(), "--out=" + out.string()}) {
    search.push_back(flag);
  }
  auto dry = search;
  dry.push_back("--dry_run");
  ASSERT_EQ(RunProgram(dry), 0);
  EXPECT_FALSE(fs::exists(out));
  ASSERT_EQ(RunProgram(UnderMpirun(2, search)), 0);
  EXPECT_EQ(ReadJsonFile(out / "search.json")["trials"].size(), 4u);
  command.push_back("--flagfile=" + (out / "best.flags").string());
  command.push_back("--out=" + (folder_ / "best").string());
  ASSERT_EQ(RunProgram(command), 0);
  EXPECT_EQ(ReadJsonFile(folder_ / "best" / "results.json")["kind"], "simple");
}

TEST_F(TrainPipeline, ALeaderboardIsOneCommand) {
  const fs::path out = folder_ / "board";
  const std::vector<std::string> command = {Bin("routecast-train"),
                                            "--quiet",
                                            "--threads=1",
                                            "--device=cpu",
                                            "--leaderboard=hidden,simple",
                                            "--seeds=1",
                                            "--steps=6",
                                            "--global_batch=16",
                                            "--micro_batch=8",
                                            "--validation_sequences=16",
                                            "--distill_weight=0.5",
                                            "--model=" + (folder_ / "model").string(),
                                            "--store=" + (folder_ / "store").string(),
                                            "--out=" + out.string()};
  auto dry = command;
  dry.push_back("--dry_run");
  ASSERT_EQ(RunProgram(dry), 0);
  EXPECT_FALSE(fs::exists(out));
  ASSERT_EQ(RunProgram(UnderMpirun(2, command)), 0);
  const Json board = ReadJsonFile(out / "leaderboard.json");
  EXPECT_EQ(board["rows"].size(), 2u + 9 + 3);
  EXPECT_GT(board["pass_us"], 0.0);
  EXPECT_TRUE(fs::exists(out / "leaderboard.html"));
}

}  // namespace
}  // namespace routecast
