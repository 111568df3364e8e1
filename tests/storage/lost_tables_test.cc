// Table files that are gone: the next job computes what was in them anew.
#include <algorithm>

#include "common/errors.h"
#include "storage/context_coder.h"
#include "storage/shard_db.h"
#include "storage/verify.h"
#include "tests/storage/store_fixture.h"

namespace routecast {
namespace {

const std::string kCode = "code: write", kLook = "recover: look at chunks";

class LostTables : public TraceStoreTest {
 protected:
  LostTables() {
    shape_.heads = 2;  // tables of all column families
    config_ = ConfigOf(shape_, 2, kChunks);
  }
  // Of the first shard of a complete store.
  void LoseTable(const std::string& family) {
    Create();
    Collect();
    fs::path lost;
    {
      const ShardDb shard(store(), 0, config_, ShardDb::Mode::kRead);
      std::vector<rocksdb::LiveFileMetaData> files;
      shard.db()->GetLiveFilesMetaData(&files);
      for (const auto& file : files) {
        if (file.column_family_name == family) lost = file.db_path + file.name;
      }
    }
    ASSERT_TRUE(fs::remove(lost)) << family;
    ASSERT_FALSE(VerifyStore(store()).sound());
  }
  // As routecast-collect does; how many chunks it computed.
  size_t Collect(const StepObserver& on_step = {}) {
    ShardOwner owner(store(), config_, 0, 1, on_step);
    const std::vector<uint32_t> done = owner.CompletedChunks();
    size_t computed = 0;
    for (uint32_t c = 0; c < kChunks; ++c) {
      if (std::find(done.begin(), done.end(), c) != done.end()) continue;
      StageChunk(store(), config_, c, kPerChunk, shape_, "again");
      EXPECT_TRUE(owner.Ingest(c, "again"));
      ++computed;
    }
    MakeContextModel(store(), config_);
    owner.Finish();
    return computed;
  }
  void ExpectSound() {
    const VerifyReport report = VerifyStore(store());
    EXPECT_TRUE(report.sound() && report.sealed)
        << testing::PrintToString(report.problems);
    ExpectEverything();
  }
};

TEST_F(LostTables, OfTheRouting) {
  LoseTable("default");
  EXPECT_GE(Collect(), 1u);
  ExpectSound();
}

TEST_F(LostTables, OfRouterInputs) {
  LoseTable("hidden");
  EXPECT_GE(Collect(), 1u);
  ExpectSound();
}

TEST_F(LostTables, OfTheAttention) {
  LoseTable("attention");
  EXPECT_GE(Collect(), 1u);
  ExpectSound();
}

// The chunks that come anew are coded as the others are.
TEST_F(LostTables, OfACodedStore) {
  shape_ = {.num_experts = 4, .top_k = 0, .max_tokens = 80, .hidden_share = 0.3};
  config_ = ConfigOf(shape_, 2, kChunks);
  config_.record = {"ids", "probs", "hidden"};
  config_.compression = "context";
  LoseTable("hidden");
  int coded = 0;
  EXPECT_GE(Collect([&](const char* step) { coded += step == kCode; }), 1u);
  EXPECT_EQ(coded, 1);
  ExpectSound();
}

// The job may die after it went back and before the chunks' marks are gone.
TEST_F(LostTables, OfAJobThatDiesWhileItLooks) {
  LoseTable("hidden");
  const auto die = [](const char* step) {
    if (step == kLook) throw EnvironmentError("dead");
  };
  EXPECT_THROW(Collect(die), EnvironmentError);
  EXPECT_GE(Collect(), 1u);
  ExpectSound();
}

// The other shard's chunks stay, and nothing is left to do afterwards.
TEST_F(LostTables, AreComputedAnewOnce) {
  LoseTable("hidden");
  EXPECT_LE(Collect(), 3u);
  EXPECT_EQ(Collect(), 0u);
  EXPECT_FALSE(fs::exists(ShardPath(store(), 0).string() + ".recovered"));
}

}  // namespace
}  // namespace routecast
