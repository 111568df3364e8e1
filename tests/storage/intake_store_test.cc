// Sources that are added to a store: its configuration, seals, coder and merges.
#include <gtest/gtest.h>

#include "common/errors.h"
#include "storage/export.h"
#include "storage/merge.h"
#include "storage/shard_db.h"
#include "storage/subset.h"
#include "storage/verify.h"
#include "tests/storage/context_store.h"

namespace routecast {
namespace {

constexpr int64_t kBefore = 4;  // chunks of the first intake; two more come later

class IntakeStore : public ContextStore {
 protected:
  IntakeStore() {
    wanted_ = config_;
    wanted_.SetIntakes(
        {{{"text:a"}, "one", kBefore, 0}, {{"text:b"}, "two", kChunks - kBefore, 7}});
    config_.SetIntakes({{{"text:a"}, "one", kBefore, 0}});
  }
  void FillFrom(const StoreConfig& config, uint32_t begin, uint32_t end) {
    ShardOwner owner(store(), config, 0, 1);
    for (uint32_t c = begin; c < end; ++c) {
      StageChunk(store(), config_of_chunks_, c, kPerChunk, shape_, "t");
      ASSERT_TRUE(owner.Ingest(c, "t"));
    }
    MakeContextModel(store(), config);
    owner.Finish();
  }
  void MakeFirst() {
    Create();
    FillFrom(config_, 0, kBefore);
  }
  void Add() {
    TraceStore::CreateOrOpen(store(), wanted_);
    FillFrom(wanted_, kBefore, kChunks);
  }
  StoreConfig wanted_;  // with both intakes
  // Ids of StageChunk are spread over all chunks.
  StoreConfig config_of_chunks_ = config_;
};

TEST_F(IntakeStore, SaysASchemaThatOlderProgramsRefuse) {
  EXPECT_EQ(config_.ToJson()["schema"], kCodedSchema);
  EXPECT_FALSE(config_.ToJson().contains("intakes"));
  Json json = wanted_.ToJson();
  EXPECT_EQ(json["schema"], kIntakesSchema);
  const StoreConfig read = StoreConfig::FromJson(json, "test");
  EXPECT_EQ(read.intakes, wanted_.intakes);
  EXPECT_EQ(read.num_chunks, kChunks);
  EXPECT_EQ(read.data, (std::vector<std::string>{"text:a", "text:b"}));
  json["schema"] = kCodedSchema;  // would not be refused by them
  EXPECT_THROW(StoreConfig::FromJson(json, "test"), DataError);
  json["schema"] = kIntakesSchema;
  json["intakes"].erase(1);
  EXPECT_THROW(StoreConfig::FromJson(json, "test"), DataError);
  json["intakes"] = 3;
  EXPECT_THROW(StoreConfig::FromJson(json, "test"), DataError);
}

TEST_F(IntakeStore, LaterChunksAreCodedAndSealedAsTheOthers) {
  MakeFirst();
  EXPECT_TRUE(VerifyStore(store()).sealed);
  const std::string model = ReadFile(ContextModelPath(store()));
  Add();
  ExpectEverything();
  EXPECT_EQ(ReadFile(ContextModelPath(store())), model);
  const VerifyReport report = VerifyStore(store());
  EXPECT_TRUE(report.sound()) << report.problems.front();
  EXPECT_TRUE(report.sealed);
  EXPECT_EQ(report.sequences, kChunks * kPerChunk);
  for (int shard = 0; shard < config_.num_shards; ++shard) {
    const ShardDb db(store(), shard, config_, ShardDb::Mode::kRead);
    CoderMark mark;
    ASSERT_TRUE(ReadCoderMark(db, &mark));
    EXPECT_GE(mark.records, 2 * kPerChunk);
  }
}

// Between the two a job may be killed: nothing may then look like damage.
TEST_F(IntakeStore, SealsGoBeforeTheConfigurationChanges) {
  MakeFirst();
  TraceStore::CreateOrOpen(store(), wanted_);
  const VerifyReport report = VerifyStore(store());
  EXPECT_TRUE(report.sound()) << report.problems.front();
  EXPECT_FALSE(report.sealed);
  EXPECT_EQ(report.chunks, kBefore);
  EXPECT_FALSE(TraceReader(store()).complete());
}

TEST_F(IntakeStore, GoesOnOnlyWithWhatItHas) {
  MakeFirst();
  Add();
  EXPECT_NO_THROW(TraceStore::RequireGoesOn(store(), wanted_, wanted_));
  StoreConfig other = wanted_;
  other.intakes[0].sources = {"text:moved/a"};  // names do not decide
  EXPECT_NO_THROW(TraceStore::CreateOrOpen(store(), other));
  other.intakes[0].corpus_fingerprint = "zero";
  EXPECT_THROW(TraceStore::CreateOrOpen(store(), other), UsageError);
  EXPECT_THROW(TraceStore::CreateOrOpen(store(), config_), UsageError);  // one is missing
  StoreConfig third = wanted_;
  std::vector<StoreIntake> all = wanted_.intakes;
  all[1].max_sequences = 8;
  all.push_back({{"text:c"}, "three", 1, 0});
  third.SetIntakes(all);
  EXPECT_THROW(TraceStore::CreateOrOpen(store(), third), UsageError);
  EXPECT_EQ(TraceStore::Open(store()).intakes, wanted_.intakes);
}

// Its number of chunks is no flag's value: the error says where it comes from.
TEST_F(IntakeStore, WhatAMergeMadeIsRefusedByThatName) {
  MakeFirst();
  WriteFileAtomic(store() / "run.json", R"({"program": "routecast-trace merge"})");
  StoreConfig more = wanted_;
  std::vector<StoreIntake> all = wanted_.intakes;
  ++all[0].num_chunks;
  more.SetIntakes(all);
  try {
    TraceStore::CreateOrOpen(store(), more);
    FAIL();
  } catch (const UsageError& e) {
    const std::string text = e.what();
    EXPECT_NE(text.find("made by `routecast-trace merge`"), std::string::npos) << text;
    EXPECT_NE(text.find("collect into another --store"), std::string::npos) << text;
  }
}

TEST_F(IntakeStore, MergesWithWhatItWasBefore) {
  MakeFirst();
  fs::copy(store(), At("before"), fs::copy_options::recursive);
  Add();
  ExportTraces(TraceReader(store()), At("whole"), {});
  const std::string whole = ReadFile(At("whole") / "traces.npz");
  for (const auto& order :
       {std::vector{At("before"), store()}, std::vector{store(), At("before")}}) {
    const MergeReport report = MergeStores(order, At("merged"), {});
    EXPECT_EQ(report.repeated, kBefore * kPerChunk);
    EXPECT_TRUE(VerifyStore(At("merged")).sound());
    EXPECT_EQ(TraceReader(At("merged")).config().intakes, wanted_.intakes);
    ExportTraces(TraceReader(At("merged")), At("export"), {});
    EXPECT_TRUE(ReadFile(At("export") / "traces.npz") == whole);
    fs::remove_all(At("merged"));
    fs::remove_all(At("export"));
  }
}

TEST_F(IntakeStore, StoresThatGrewApartAreOfTwoCorpora) {
  MakeFirst();
  fs::copy(store(), At("other"), fs::copy_options::recursive);
  Add();
  StoreConfig other = wanted_;
  other.intakes[1].corpus_fingerprint = other.corpus_fingerprint = "three";
  other.intakes[1].num_chunks = 0;
  other.num_chunks = kBefore;
  TraceStore::CreateOrOpen(At("other"), other);
  EXPECT_THROW(MergeStores({store(), At("other")}, At("merged"), {}), UsageError);
}

TEST_F(IntakeStore, ASubsetOfAllIsAll) {
  MakeFirst();
  Add();
  SubsetStore(store(), At("subset"), {.compression = "none", .share = 1});
  EXPECT_TRUE(VerifyStore(At("subset")).sound());
  ExportTraces(TraceReader(store()), At("a"), {});
  ExportTraces(TraceReader(At("subset")), At("b"), {});
  EXPECT_TRUE(ReadFile(At("a") / "traces.npz") == ReadFile(At("b") / "traces.npz"));
}

}  // namespace
}  // namespace routecast
