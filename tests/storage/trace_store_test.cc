#include "storage/trace_store.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>
#include <future>

#include "common/errors.h"
#include "storage/store_lock.h"
#include "storage/trace_reader.h"
#include "tests/storage/store_fixture.h"

namespace routecast {
namespace {

TEST_F(TraceStoreTest, GivesBackWhatAMapHolds) {
  Fill();
  ExpectEverything();
  const auto all = All();
  const TraceReader reader(store());
  std::vector<uint64_t> ids = reader.sequence_ids();
  std::reverse(ids.begin(), ids.end());
  const auto many = reader.ReadMany(ids, WithHidden::kNo);
  for (size_t i = 0; i < ids.size(); ++i) {
    EXPECT_EQ(reader.Read(ids[i], WithHidden::kYes), all.at(ids[i]));
    RoutingTrace without = all.at(ids[i]);
    for (RoutingSpan* span : {&without.encoder, &without.decoder}) {
      span->hidden.clear();
      span->output.clear();
      span->hidden_width = 0;
    }
    EXPECT_EQ(many[i], without);
    EXPECT_EQ(reader.Find(ids[i])->group_id, without.group_id);
  }
  EXPECT_THROW(reader.Read(12345, WithHidden::kNo), UsageError);
}

TEST_F(TraceStoreTest, CompactionKeepsEverything) {
  Fill();
  ShardOwner(store(), config_, 0, 1).Compact();
  ExpectEverything();
}

// Whoever watches a job sees that it goes on: disks may be slow.
TEST_F(TraceStoreTest, OpeningAndSealingShardsAreManySteps) {
  Fill();
  std::map<std::string, int> steps;
  ShardOwner owner(store(), config_, 0, 1, [&](const char* step) { ++steps[step]; });
  EXPECT_EQ(steps["open shard"], config_.num_shards);
  owner.Finish();
  EXPECT_GT(steps[kHashStep], config_.num_shards);
}

TEST_F(TraceStoreTest, IngestingTwiceChangesNothing) {
  Fill();
  ShardOwner owner(store(), config_, 0, 1);
  StageChunk(store(), config_, 2, kPerChunk, shape_, "again");
  EXPECT_FALSE(owner.Ingest(2, "again"));
  EXPECT_FALSE(fs::exists(TraceStore::StagingFolder(store(), 2, "again")));
  ExpectEverything();
}

TEST_F(TraceStoreTest, OwnersShareTheShards) {
  Create();
  {
    ShardOwner even(store(), config_, 0, 2), odd(store(), config_, 1, 2);
    for (uint32_t c = 0; c < kChunks; ++c) {
      StageChunk(store(), config_, c, kPerChunk, shape_, "t");
      EXPECT_EQ(even.Owns(c), c % 2 == 0);
      (even.Owns(c) ? even : odd).Ingest(c, "t");
    }
    EXPECT_EQ(odd.CompletedChunks(), (std::vector<uint32_t>{1, 3, 5}));
  }
  ExpectEverything();
}

TEST_F(TraceStoreTest, RefusesAnotherConfigurationWithBothValues) {
  Create();
  StoreConfig other = config_;
  other.threads = 7;
  other.model_fingerprint = "bb";
  try {
    TraceStore::CreateOrOpen(store(), other);
    FAIL();
  } catch (const UsageError& e) {
    EXPECT_NE(std::string(e.what()).find("threads: 1 in the store, not 7"),
              std::string::npos);
    EXPECT_NE(std::string(e.what()).find("bb"), std::string::npos);
  }
}

// A folder of results has a run.json, too; files whose names begin so are somebody's.
TEST_F(TraceStoreTest, TakesAFolderThatAStartLeftAndNoOther) {
  MakeFolder(store());
  for (const char* name : {"run.json", "run.json.12.tmp", "lock.guard", "routers.hash"}) {
    WriteFileAtomic(store() / name, "{}");
  }
  for (const char* name : {"run.json.bak", "lock.txt", "notes.tmp", "run.json.x.tmp"}) {
    WriteFileAtomic(store() / name, "");
    EXPECT_THROW(TraceStore::CreateOrOpen(store(), config_), UsageError) << name;
    fs::remove(store() / name);
  }
  TraceStore::CreateOrOpen(store(), config_);
  EXPECT_TRUE(fs::exists(store() / "store.json"));
}

TEST_F(TraceStoreTest, SamplingIsPartOfWhatAStoreIs) {
  StoreConfig sampled = config_;
  sampled.sampling = {0.7, 5, 0.9, 11};
  const auto differences = [](const StoreConfig& a, const StoreConfig& b) {
    return Differences(a, b).size();
  };
  EXPECT_EQ(differences(config_, sampled), 1u);
  EXPECT_EQ(differences(sampled, config_), 1u);
  const StoreConfig read = StoreConfig::FromJson(sampled.ToJson(), "store.json");
  EXPECT_EQ(differences(read, sampled), 0u);
  sampled.sampling.seed = 12;
  EXPECT_EQ(differences(read, sampled), 1u);
  EXPECT_FALSE(config_.ToJson().contains("sampling"));
  Json broken = sampled.ToJson();
  broken["sampling"]["top_p"] = 0;
  EXPECT_THROW(StoreConfig::FromJson(broken, "store.json"), DataError);
}

TEST_F(TraceStoreTest, RefusesAnotherSchemaWithBothValues) {
  Create();
  Json json = config_.ToJson();
  json["schema"] = 9;
  WriteFileAtomic(store() / "store.json", json.dump());
  EXPECT_THROW(TraceStore::Open(store()), UsageError);
}

TEST_F(TraceStoreTest, DamagedConfigurationIsBadData) {
  Create();
  const std::string good = config_.ToJson().dump();
  for (const std::string& bad : {good.substr(0, good.size() / 2), std::string("[]"),
                                 std::string("{\"schema\": 1}"), std::string()}) {
    WriteFileAtomic(store() / "store.json", bad);
    EXPECT_THROW(TraceStore::Open(store()), DataError) << bad;
  }
}

TEST_F(TraceStoreTest, RefusesAFolderOfSomethingElse) {
  MakeFolder(store());
  WriteFileAtomic(store() / "thesis.tex", "x");
  EXPECT_THROW(Create(), UsageError);
  EXPECT_THROW(TraceReader{store()}, UsageError);
}

TEST_F(TraceStoreTest, ADamagedStagedFileIsNotIngested) {
  Create();
  StageChunk(store(), config_, 0, kPerChunk, shape_, "t");
  const fs::path file = TraceStore::StagingFolder(store(), 0, "t") / "routing.sst";
  std::string bytes = ReadFile(file);
  bytes[bytes.size() / 3] = static_cast<char>(bytes[bytes.size() / 3] ^ 1);
  std::ofstream(file, std::ios::binary) << bytes;
  ShardOwner owner(store(), config_, 0, 1);
  EXPECT_THROW(owner.Ingest(0, "t"), DataError);
  EXPECT_TRUE(owner.CompletedChunks().empty());
}

TEST_F(TraceStoreTest, OneJobAtATime) {
  Create();
  const StoreLock lock(store());
  try {
    StoreLock second(store());
    FAIL();
  } catch (const EnvironmentError& e) {
    EXPECT_NE(std::string(e.what()).find(std::to_string(::getpid())), std::string::npos);
  }
}

TEST_F(TraceStoreTest, TheLockOfADeadProcessIsTakenOver) {
  Create();
  const pid_t child = ::fork();
  if (child == 0) {
    new StoreLock(store());
    ::_exit(0);
  }
  ::waitpid(child, nullptr, 0);
  EXPECT_TRUE(fs::exists(store() / "lock.json"));
  { StoreLock lock(store()); }
  EXPECT_FALSE(fs::exists(store() / "lock.json"));
}

// A job that stood still for minutes comes back: its end must not free the other's lock.
TEST_F(TraceStoreTest, ALockThatAnotherJobTookOverIsLeftAlone) {
  Create();
  const fs::path file = store() / "lock.json";
  {
    const StoreLock lock(store());
    Json other = ReadJsonFile(file);
    other["token"] = "of another job";
    std::ofstream(file) << other.dump();
  }
  EXPECT_TRUE(fs::exists(file));
}

// And it must write no more.
TEST_F(TraceStoreTest, AJobThatLostItsLockIsTold) {
  Create();
  const fs::path file = store() / "lock.json";
  std::promise<std::string> told;
  const StoreLock lock(
      store(), [&told](const std::string& error) { told.set_value(error); },
      std::chrono::milliseconds(5));
  Json other = ReadJsonFile(file);
  other["token"] = "of another job";
  WriteFileAtomic(file, other.dump());
  EXPECT_NE(told.get_future().get().find("taken over by another job"), std::string::npos);
}

// The other one may have ended already, and have taken its lock with it.
TEST_F(TraceStoreTest, AJobThatLostItsLockIsToldAfterTheOtherHasEnded) {
  Create();
  std::promise<std::string> told;
  const StoreLock lock(
      store(), [&told](const std::string& error) { told.set_value(error); },
      std::chrono::milliseconds(5));
  fs::remove(store() / "lock.json");
  std::future<std::string> error = told.get_future();
  ASSERT_EQ(error.wait_for(std::chrono::seconds(10)), std::future_status::ready);
  EXPECT_NE(error.get().find("taken over by another job"), std::string::npos);
}

TEST_F(TraceStoreTest, WhoWritesAsksForTheLockBetweenHeartbeats) {
  Create();
  const fs::path file = store() / "lock.json";
  const StoreLock lock(store());
  EXPECT_NO_THROW(StoreLock::RequireHeld(store(), lock.token()));
  Json other = ReadJsonFile(file);
  other["token"] = "of another job";
  WriteFileAtomic(file, other.dump());
  EXPECT_THROW(StoreLock::RequireHeld(store(), lock.token()), EnvironmentError);
  fs::remove(file);
  EXPECT_THROW(StoreLock::RequireHeld(store(), lock.token()), EnvironmentError);
}

// Of a process on another host there is only its heartbeat.
TEST_F(TraceStoreTest, ALockOfAnotherHostHoldsWhileItsHeartbeatIsFresh) {
  Create();
  const fs::path file = store() / "lock.json";
  std::ofstream(file) << R"({"host": "elsewhere", "pid": 1, "job": "7"})";
  try {
    StoreLock second(store());
    FAIL();
  } catch (const EnvironmentError& e) {
    EXPECT_NE(std::string(e.what()).find("host elsewhere, process 1, job \"7\""),
              std::string::npos)
        << e.what();
  }
  fs::last_write_time(file, fs::last_write_time(file) - std::chrono::minutes(3));
  EXPECT_NO_THROW(StoreLock{store()});
}

// Whatever lies there, written by whom: nobody holds the store by it.
TEST_F(TraceStoreTest, ALockFileOfSomethingElseHoldsNobody) {
  Create();
  for (const char* text : {"", "[]", "7", "{\"host\": 7}", "{\"pid\": \"x\"}"}) {
    std::ofstream(store() / "lock.json") << text;
    EXPECT_NO_THROW(StoreLock{store()}) << text;
  }
}

// It may be a living holder's.
TEST_F(TraceStoreTest, ALockFileThatCannotBeReadIsAnError) {
  Create();
  const fs::path file = store() / "lock.json";
  fs::create_symlink(file, file);
  EXPECT_THROW(StoreLock{store()}, EnvironmentError);
}

TEST_F(TraceStoreTest, RecordsOfAnotherTopKThanTheStoresAreRefused) {
  Create();
  shape_.top_k = 1;
  ShardOwner owner(store(), config_, 0, 1);
  for (uint32_t c = 0; c < kChunks; ++c) {
    StageChunk(store(), config_, c, kPerChunk, shape_, "t");
    owner.Ingest(c, "t");
  }
  const TraceReader reader(store());
  EXPECT_THROW(reader.Read(reader.sequence_ids()[0], WithHidden::kNo), DataError);
}

}  // namespace
}  // namespace routecast
