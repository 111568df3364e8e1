// A store whose ids are coded once it is complete, and deaths on the way there. RocksDB's
// threads do not survive fork(), so the deaths happen in children only.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>

#include "common/errors.h"
#include "storage/context_coder.h"
#include "storage/context_trainer.h"
#include "storage/export.h"
#include "storage/import.h"
#include "storage/merge.h"
#include "storage/shard_db.h"
#include "storage/subset.h"
#include "storage/verify.h"
#include "tests/storage/store_fixture.h"

namespace routecast {
namespace {

constexpr int kDied = 99;

class ContextStore : public TraceStoreTest {
 protected:
  ContextStore() {
    // Few experts, so that random traces repeat enough for a model to have rows.
    shape_ = {.num_experts = 4, .top_k = 0, .max_tokens = 80, .hidden_share = 0.3};
    config_ = ConfigOf(shape_, 3, kChunks);
    config_.record = {"ids", "probs", "hidden"};
    config_.compression = "context";
  }
  void Code(const StepObserver& on_step = {}) {
    MakeContextModel(store(), config_, on_step);
    ShardOwner(store(), config_, 0, 1, on_step).Compact();
  }
  fs::path At(const std::string& name) const { return folder_.path() / name; }
  int CodedShards(const fs::path& path) const {
    int coded = 0;
    for (int shard = 0; shard < config_.num_shards; ++shard) {
      const ShardDb db(path, shard, config_.compression, ShardDb::Mode::kRead);
      CoderMark mark;
      coded += ReadCoderMark(db, &mark);
    }
    return coded;
  }
};

TEST_F(ContextStore, GivesEverythingBack) {
  Fill();
  EXPECT_EQ(CodedShards(store()), 0);
  Code();
  EXPECT_EQ(CodedShards(store()), config_.num_shards);
  ExpectEverything();
  const TraceReader reader(store());
  for (const auto& [id, trace] : All())
    EXPECT_EQ(reader.Read(id, WithHidden::kYes), trace);
}

TEST_F(ContextStore, IsSoundAndCounted) {
  Fill();
  Code();
  const VerifyReport report = VerifyStore(store());
  EXPECT_TRUE(report.sound()) << report.problems.front();
  EXPECT_EQ(report.sequences, kChunks * kPerChunk);
}

TEST_F(ContextStore, ExportsAsAPlainStoreDoes) {
  Fill();
  ExportTraces(TraceReader(store()), At("plain"), {});
  Code();
  ExportTraces(TraceReader(store()), At("coded"), {});
  EXPECT_EQ(ReadFile(At("plain") / "traces.npz"), ReadFile(At("coded") / "traces.npz"));
}

TEST_F(ContextStore, CodingTwiceChangesNothing) {
  Fill();
  Code();
  const std::string model = ReadFile(ContextModelPath(store()));
  int steps = 0;
  Code([&](const char*) { ++steps; });
  EXPECT_EQ(steps, 0);
  EXPECT_EQ(ReadFile(ContextModelPath(store())), model);
}

TEST_F(ContextStore, TheModelDoesNotDependOnTheOrderOfChunks) {
  Fill();
  MakeContextModel(store(), config_);
  const std::string model = ReadFile(ContextModelPath(store()));
  fs::remove_all(store());
  Create();
  {
    ShardOwner owner(store(), config_, 0, 1);
    for (uint32_t c = kChunks; c-- > 0;) {
      StageChunk(store(), config_, c, kPerChunk, shape_, "t");
      owner.Ingest(c, "t");
    }
  }
  MakeContextModel(store(), config_);
  EXPECT_EQ(ReadFile(ContextModelPath(store())), model);
}

TEST_F(ContextStore, WithoutItsModelItIsRefused) {
  Fill();
  Code();
  const std::string model = ReadFile(ContextModelPath(store()));
  fs::remove(ContextModelPath(store()));
  EXPECT_THROW(TraceReader{store()}, DataError);
  std::string damaged = model;
  damaged[model.size() / 2] ^= 1;
  std::ofstream(ContextModelPath(store()), std::ios::binary) << damaged;
  EXPECT_THROW(TraceReader{store()}, DataError);
  EXPECT_FALSE(VerifyStore(store()).sound());
}

TEST_F(ContextStore, AnotherStoresModelIsRefused) {
  Fill();
  Code();
  ContextTrainer trainer(config_.geometry, {});
  WriteFileAtomic(ContextModelPath(store()), trainer.Train("test").Serialize());
  EXPECT_THROW(TraceReader{store()}, DataError);
}

TEST_F(ContextStore, SaysASchemaThatOlderProgramsRefuse) {
  EXPECT_EQ(config_.ToJson()["schema"], kCodedSchema);
  StoreConfig plain = config_;
  plain.compression = "zstd";
  EXPECT_EQ(plain.ToJson()["schema"], kStoreSchema);
  Json json = config_.ToJson();
  json["schema"] = kStoreSchema;  // a coder under the old schema would not be refused
  EXPECT_THROW(StoreConfig::FromJson(json, "test"), DataError);
  json["schema"] = kCodedSchema + 1;
  EXPECT_THROW(StoreConfig::FromJson(json, "test"), UsageError);
}

TEST_F(ContextStore, TooManyExpertsAreRefused) {
  config_.geometry.num_experts = kMaxCodedExperts + 1;
  EXPECT_THROW(Create(), UsageError);
}

TEST_F(ContextStore, MergeKeepsOrTakesTheCoder) {
  Fill();
  Code();
  MergeStores({store()}, At("kept"), {});
  EXPECT_EQ(CodedShards(At("kept")), config_.num_shards);
  MergeStores({store()}, At("plain"), {.compression = "none"});
  EXPECT_EQ(CodedShards(At("plain")), 0);
  MergeStores({At("plain")}, At("again"), {.compression = "context+zstd"});
  ExportTraces(TraceReader(At("kept")), At("x"), {});
  ExportTraces(TraceReader(At("again")), At("y"), {});
  EXPECT_EQ(ReadFile(At("x") / "traces.npz"), ReadFile(At("y") / "traces.npz"));
}

TEST_F(ContextStore, SubsetAndImportTakeTheCoder) {
  config_.compression = "none";
  Fill();
  SubsetStore(store(), At("part"), {.compression = "context", .share = 1});
  EXPECT_EQ(CodedShards(At("part")), config_.num_shards);
  ExportTraces(TraceReader(store()), At("x"), {});
  ImportTraces(At("x"), At("in"), {.compression = "context"});
  EXPECT_TRUE(fs::exists(ContextModelPath(At("in"))));
  ExportTraces(TraceReader(At("in")), At("y"), {});
  EXPECT_EQ(ReadFile(At("x") / "traces.npz"), ReadFile(At("y") / "traces.npz"));
}

// In a child: this program's own RocksDB threads would not survive the fork.
int InChild(const std::function<void()>& work) {
  std::fflush(nullptr);
  const pid_t child = ::fork();
  if (child == 0) {
    try {
      work();
    } catch (const std::exception& e) {
      std::fprintf(stderr, "%s\n", e.what());
      ::_exit(71);
    }
    ::_exit(testing::Test::HasFailure() ? 70 : 0);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

using ContextStoreDeath = ContextStore;
TEST_F(ContextStoreDeath, AtAnyStepOfCodingLeavesAllReadableAndIsFinishedLater) {
  ASSERT_EQ(InChild([&] { Fill(); }), 0);
  fs::rename(store(), At("plain"));
  int deaths = 0;
  for (int step = 1;; ++step) {
    fs::remove_all(store());
    fs::copy(At("plain"), store(), fs::copy_options::recursive);
    const int code = InChild([&] {
      int steps = 0;
      Code([&](const char*) {
        if (++steps == step) ::_exit(kDied);
      });
    });
    ASSERT_EQ(InChild([&] { ExpectEverything(); }), 0);
    if (code == 0) break;
    ASSERT_EQ(code, kDied);
    ++deaths;
    ASSERT_EQ(InChild([&] {
                TraceStore::CleanStaging(store());
                Code();
                EXPECT_EQ(CodedShards(store()), config_.num_shards);
                EXPECT_TRUE(VerifyStore(store()).sound());
              }),
              0);
  }
  EXPECT_GT(deaths, 10);
}

}  // namespace
}  // namespace routecast
