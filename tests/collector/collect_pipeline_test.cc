// routecast-collect as people run it: under mpirun, with other numbers of ranks, killed,
// stopped.
#include <gtest/gtest.h>

#include <chrono>
#include <fstream>
#include <regex>
#include <thread>

#include "common/errors.h"
#include "storage/trace_reader.h"
#include "tests/collector/collect_fixture.h"

namespace routecast {
namespace {

class CollectTest : public CollectFixture {};

TEST_F(CollectTest, RanksDoNotChangeTheRecords) {
  for (const int ranks : {2, 3}) {
    const std::string store = "ranks" + std::to_string(ranks);
    ASSERT_EQ(Collect(ranks, store), 0);
    EXPECT_TRUE(Export(store) == Golden()) << ranks;
  }
}

TEST_F(CollectTest, ItsRecordNamesRanksAndHosts) {
  ASSERT_EQ(Collect(3, "hosts", {"--max_sequences=20"}), 0);
  const Json record = ReadJsonFile(folder_ / "hosts" / "run.json");
  EXPECT_EQ(record["ranks"], 3);
  EXPECT_EQ(record["hosts"], Json::array({record["host"]}));
}

TEST_F(CollectTest, HeartbeatsSayTheRateAndWhatEachRankHasDone) {
  const fs::path said = folder_ / "heartbeats.said";
  ASSERT_EQ(Wait(Start(Command(2, "heartbeats", {"--quiet=false"}), said)), 0);
  const std::string text = ReadFile(said);
  const std::regex line(
      "collect: ([0-9]+)/([0-9]+) chunks, .*[0-9]+ sequences, [0-9]+ tokens/s, "
      "chunks a rank ([0-9]+) ([0-9]+)");
  std::smatch last;
  for (std::sregex_iterator it(text.begin(), text.end(), line), end; it != end; ++it) {
    last = *it;
  }
  ASSERT_FALSE(last.empty()) << text;
  EXPECT_EQ(last[1], last[2]);
  EXPECT_EQ(std::stoi(last[3]) + std::stoi(last[4]), std::stoi(last[2]));
  const Json record = ReadJsonFile(folder_ / "heartbeats" / "run.json");
  EXPECT_EQ(record["results"]["chunks_of_rank"],
            Json::array({std::stoi(last[3]), std::stoi(last[4])}));
}

// Each expert lives on one rank of a group; groups work side by side. An expert runs the
// tokens of one rank at a time, so not even a bit differs.
TEST_F(CollectTest, ExpertParallelGroupsRecordTheSame) {
  for (const int ranks : {2, 4}) {
    const std::string store = "shared" + std::to_string(ranks);
    ASSERT_EQ(Collect(ranks, store, {"--expert_parallel=2"}), 0);
    EXPECT_TRUE(Export(store) == Golden()) << ranks;
  }
  // The degree is part of what the store is.
  EXPECT_EQ(Collect(1, "shared2"), kExitUsage);
}

TEST_F(CollectTest, ExpertParallelGenerationEqualsOneRanks) {
  const std::vector<std::string> task = {"--task=generate", "--max_sequences=60"};
  ASSERT_EQ(Collect(1, "generated1", task), 0);
  std::vector<std::string> shared = task;
  shared.push_back("--expert_parallel=3");
  ASSERT_EQ(Collect(3, "generated3", shared), 0);
  EXPECT_TRUE(Export("generated3") == Export("generated1"));
}

TEST_F(CollectTest, AKilledExpertGroupGoesOn) {
  const fs::path record = folder_ / "shared-killed" / "run.json";
  const std::vector<std::string> shared = {"--expert_parallel=2"};
  ASSERT_EQ(Interrupt(Command(2, "shared-killed", shared), record, SIGUSR1, kExitStopped,
                      [] { fs::remove_all(folder_ / "shared-killed"); }),
            kExitStopped);
  ASSERT_EQ(Collect(4, "shared-killed", shared), 0);
  EXPECT_TRUE(Export("shared-killed") == Golden());
}

TEST_F(CollectTest, KilledAtAnyMomentItEndsWithTheSameRecords) {
  const auto begin = std::chrono::steady_clock::now();
  Golden();
  const auto whole = std::chrono::steady_clock::now() - begin;
  int killed = 0;
  for (int run = 0; run < 6; ++run) {
    const pid_t job = Start(Command(1 + run % 3, "killed", {}));
    std::this_thread::sleep_for(whole * (1 + run) / 7 + std::chrono::milliseconds(300));
    ::kill(job, SIGKILL);  // ranks die with their launcher, at different moments
    killed += Wait(job) == 128 + SIGKILL;
    WaitForOrphans();
    if (killed >= 4) break;
  }
  ASSERT_EQ(Collect(2, "killed"), 0);
  EXPECT_TRUE(Export("killed") == Golden()) << killed << " kills";
}

// A limit that has passed before the first chunk: every run still adds one a rank.
TEST_F(CollectTest, ShortAllocationsEndWithTheSameRecords) {
  int64_t chunks = 0;
  for (int run = 0; run < 2; ++run) {
    ASSERT_EQ(Collect(2, "short", {"--max_hours=1e-9"}), kExitStopped);
    const Json record = ReadJsonFile(folder_ / "short" / "run.json");
    EXPECT_EQ(record["exit_status"], kExitStopped);
    EXPECT_GT(record["results"]["chunks"], chunks);
    chunks = record["results"]["chunks"];
  }
  ASSERT_EQ(Collect(1, "short"), 0);
  EXPECT_TRUE(Export("short") == Golden());
  // The last run's, and beside it the store's.
  const Json results = ReadJsonFile(folder_ / "short" / "run.json")["results"];
  EXPECT_LT(results["sequences"], 1200);
  EXPECT_EQ(results["store"]["sequences"], 1200);
}

// Nothing seals the file while the store is unfinished.
TEST_F(CollectTest, DamagedRoutersAreFoundAndMadeAnew) {
  Golden();
  const std::string good = ReadFile(folder_ / "golden" / "routers.safetensors");
  const fs::path file = folder_ / "routers" / "routers.safetensors";
  const auto verify = [] {
    return RunProgram({Bin("routecast-trace"), "verify", "--quiet",
                       "--store=" + (folder_ / "routers").string()});
  };
  ASSERT_EQ(Collect(2, "routers", {"--max_hours=1e-9"}), kExitStopped);
  EXPECT_EQ(verify(), 0);
  std::string flipped = good;
  flipped[good.size() / 2] ^= 1;
  for (const std::string& bad : {flipped, good.substr(0, good.size() / 3)}) {
    std::ofstream(file, std::ios::binary) << bad;
    EXPECT_EQ(verify(), kExitBadData);
    ASSERT_EQ(Collect(1, "routers", {"--max_hours=1e-9"}), kExitStopped);
    EXPECT_TRUE(ReadFile(file) == good);
    EXPECT_EQ(verify(), 0);
  }
  // As in stores of before, which have no hash of it.
  fs::remove(folder_ / "routers" / "routers.hash");
  EXPECT_EQ(verify(), 0);
  std::ofstream(file, std::ios::binary) << flipped;
  ASSERT_EQ(Collect(1, "routers"), 0);
  EXPECT_TRUE(ReadFile(file) == good);
}

// mpirun forwards SIGUSR1, the graceful signal, to every rank.
TEST_F(CollectTest, ASignalSavesAndEndsWithItsOwnCode) {
  const fs::path record = folder_ / "signalled" / "run.json";
  ASSERT_EQ(Interrupt(Command(2, "signalled", {}), record, SIGUSR1, kExitStopped,
                      [] { fs::remove_all(folder_ / "signalled"); }),
            kExitStopped);
  EXPECT_EQ(ReadJsonFile(record)["exit_status"], kExitStopped);
  ASSERT_EQ(Collect(3, "signalled"), 0);
  EXPECT_TRUE(Export("signalled") == Golden());
}

TEST_F(CollectTest, AFinishedStoreIsLeftAlone) {
  Golden();
  EXPECT_EQ(Collect(2, "golden"), 0);
  EXPECT_TRUE(Export("golden") == Golden());
}

// However many chunks there are; every rank looks, also in a dry run.
TEST_F(CollectTest, NeedsFewOpenFiles) {
  Golden();
  const auto with_few = [](int ranks, const std::string& store, const std::string& limit,
                           const std::vector<std::string>& more) {
    std::vector<std::string> command = {"bash", "-c", limit + "; exec \"$@\"", "-"};
    const std::vector<std::string> collect = Program(store, more);
    command.insert(command.end(), collect.begin(), collect.end());
    return RunProgram(ranks == 1 ? command : UnderMpirun(ranks, command));
  };
  const std::string few = "ulimit -n 180";
  EXPECT_EQ(with_few(1, "golden", few, {}), 0);
  EXPECT_EQ(with_few(1, "golden", few, {"--dry_run"}), 0);
  EXPECT_EQ(with_few(1, "few", few, {}), 0);
  EXPECT_TRUE(Export("few") == Golden());
  const std::string of_rank_1 = "[ $OMPI_COMM_WORLD_RANK = 0 ] || ulimit -n 90";
  EXPECT_EQ(with_few(2, "golden", of_rank_1, {"--dry_run"}), kExitEnvironment);
}

TEST_F(CollectTest, ARunWithNothingToDoKeepsTheFiguresOfTheOneBefore) {
  ASSERT_EQ(Collect(1, "twice", {"--max_sequences=40"}), 0);
  const fs::path file = folder_ / "twice" / "run.json";
  const Json first = ReadJsonFile(file);
  EXPECT_EQ(first["results"]["sequences"], 40);
  for (int run = 0; run < 2; ++run) {
    ASSERT_EQ(Collect(1, "twice", {"--max_sequences=40"}), 0);
    const Json again = ReadJsonFile(file);
    EXPECT_EQ(again["results"], first["results"]);
    EXPECT_EQ(again["collected"]["start"], first["start"]);
    EXPECT_EQ(again["exit_status"], 0);
  }
}

TEST_F(CollectTest, AnEarlyEndKeepsWhatTheFinishedRunSaid) {
  Golden();
  const fs::path file = folder_ / "golden" / "run.json";
  Json before = ReadJsonFile(file);
  before["results"]["left_out"] = {{"sequences", 1}, {"ids", {7}}};
  WriteFileAtomic(file, before.dump());
  WriteCheckpoint(folder_ / "cut", 1);
  fs::resize_file(folder_ / "cut" / "model.safetensors", 5000);
  ASSERT_EQ(Collect(1, "golden", {"--model=" + (folder_ / "cut").string()}),
            kExitBadData);
  const Json after = ReadJsonFile(file);
  EXPECT_EQ(after["exit_status"], kExitBadData);
  for (const char* key : {"checkpoint", "corpus", "hosts", "libraries"}) {
    EXPECT_EQ(after.value(key, Json()), before[key]) << key;
  }
  EXPECT_EQ(after["results"], Json({{"left_out", before["results"]["left_out"]}}));
}

TEST_F(CollectTest, OtherTasksFillTheStacksTheyRun) {
  ASSERT_EQ(Collect(2, "encode", {"--task=encode", "--max_sequences=40"}), 0);
  const TraceReader encoded(folder_ / "encode");
  for (const SequenceInfo& s : encoded.sequences()) {
    EXPECT_GT(s.encoder_tokens, 0u);
    EXPECT_EQ(s.decoder_tokens, 0u);
  }
  ASSERT_EQ(Collect(2, "generate",
                    {"--task=generate", "--max_sequences=16", "--record=ids,topk",
                     "--top_k=3"}),
            0);
  const TraceReader reader(folder_ / "generate");
  EXPECT_EQ(reader.sequences().size(), 16u);
  for (const SequenceInfo& s : reader.sequences()) {
    const RoutingTrace t = reader.Read(s.sequence_id, WithHidden::kNo);
    ASSERT_GT(t.decoder.num_tokens, 0);
    EXPECT_TRUE(t.decoder.gate_probs.empty());
    for (size_t i = 0; i < t.decoder.expert_ids.size(); ++i) {
      EXPECT_EQ(t.decoder.topk_ids[3 * i],
                t.decoder.expert_ids[i]);  // the choice comes first
    }
  }
}

TEST_F(CollectTest, SampledTokensDependOnTheSeedAndNotOnTheRanks) {
  const auto collect = [](int ranks, const std::string& store,
                          std::vector<std::string> more) {
    for (const char* flag : {"--task=generate", "--max_sequences=16", "--record=ids"}) {
      more.push_back(flag);
    }
    return Collect(ranks, store, more);
  };
  const std::string hot = "--temperature=1.5", seed = "--sample_seed=2";
  ASSERT_EQ(collect(1, "greedy", {}), 0);
  ASSERT_EQ(collect(1, "sampled", {hot, seed}), 0);
  ASSERT_EQ(collect(2, "sampled2", {hot, seed}), 0);
  ASSERT_EQ(collect(1, "sampled3", {hot, "--sample_seed=3"}), 0);
  const std::string sampled = Export("sampled");
  EXPECT_TRUE(sampled == Export("sampled2"));
  EXPECT_FALSE(sampled == Export("greedy"));
  EXPECT_FALSE(sampled == Export("sampled3"));
  // A store goes on only with the sampling that it was begun with.
  EXPECT_EQ(collect(1, "sampled", {}), kExitUsage);
  EXPECT_EQ(collect(1, "sampled", {hot, "--sample_seed=3"}), kExitUsage);
  EXPECT_EQ(collect(1, "greedy", {hot}), kExitUsage);
}

}  // namespace
}  // namespace routecast
