// A store whose ids are coded once it is complete.
#include "tests/storage/context_store.h"

#include <gtest/gtest.h>

#include <fstream>

#include "common/errors.h"
#include "storage/context_trainer.h"
#include "storage/export.h"
#include "storage/import.h"
#include "storage/merge.h"
#include "storage/salvage.h"
#include "storage/shard_db.h"
#include "storage/subset.h"
#include "storage/verify.h"

namespace routecast {
namespace {

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
  // A shard is opened to be asked whether it is coded.
  Code([&](const char* step) { steps += std::string_view(step) != "open shard"; });
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
  json["schema"] = kLeftOutSchema + 1;
  EXPECT_THROW(StoreConfig::FromJson(json, "test"), UsageError);
}

TEST_F(ContextStore, TheDecodersOutputHasASchemaThatOlderProgramsRefuse) {
  StoreConfig with = config_;
  with.record.push_back("output");
  Json json = with.ToJson();
  EXPECT_EQ(json["schema"], kOutputSchema);
  EXPECT_TRUE(StoreConfig::FromJson(json, "test").Records("output"));
  json["schema"] = kCodedSchema;
  EXPECT_THROW(StoreConfig::FromJson(json, "test"), DataError);
  json = config_.ToJson();
  json["schema"] = kOutputSchema;
  EXPECT_THROW(StoreConfig::FromJson(json, "test"), DataError);
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

// What coding and damage have to do with each other: a complete store's seals name the
// model, and records are found where no manifest leads to them.
TEST_F(ContextStore, SealsNameTheModel) {
  Fill();
  Code();
  ShardOwner(store(), config_, 0, 1).Finish();
  EXPECT_TRUE(VerifyStore(store()).sound());
  const fs::path file = ContextModelPath(store());
  std::string model = ReadFile(file);
  model[model.size() / 2] ^= 1;
  std::ofstream(file, std::ios::binary) << model;
  bool named = false;
  for (const std::string& problem : VerifyStore(store()).problems) {
    named = named || problem.find("context.model") != std::string::npos;
  }
  EXPECT_TRUE(named);
}

TEST_F(ContextStore, IsSalvagedWithoutItsManifest) {
  Fill();
  Code();
  ShardOwner(store(), config_, 0, 1).Finish();
  fs::remove(ShardPath(store(), 1) / "CURRENT");
  EXPECT_FALSE(VerifyStore(store()).sound());
  const SalvageReport report = SalvageStore(store(), At("saved"));
  EXPECT_EQ(report.sequences, kChunks * kPerChunk);
  EXPECT_EQ(report.lost, 0u);
  const TraceReader saved(At("saved"));
  for (const auto& [id, trace] : All()) {
    EXPECT_EQ(saved.Read(id, WithHidden::kYes), trace);
  }
}

}  // namespace
}  // namespace routecast
