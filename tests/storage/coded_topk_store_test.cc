// A store whose top-k ids are coded with its expert ids once it is complete.
#include <gtest/gtest.h>

#include "storage/export.h"
#include "storage/merge.h"
#include "storage/salvage.h"
#include "storage/verify.h"
#include "tests/storage/context_store.h"

namespace routecast {
namespace {

class CodedTopkStore : public ContextStore {
 protected:
  CodedTopkStore() {
    shape_.num_experts = 8;
    shape_.top_k = 4;
    shape_.distinct = true;
    config_ = ConfigOf(shape_, 3, kChunks);
    config_.compression = "context";
  }
  // Records whose top-k ids are coded.
  int Coded(const fs::path& path) const {
    int coded = 0;
    for (int shard = 0; shard < config_.num_shards; ++shard) {
      const ShardDb db(path, shard, config_, ShardDb::Mode::kRead);
      const std::unique_ptr<rocksdb::Iterator> it(
          db.db()->NewIterator(rocksdb::ReadOptions(), db.family(Family::kRouting)));
      for (it->SeekToFirst(); it->Valid(); it->Next()) {
        coded += it->value()[0] == kCodedTopkVersion;
      }
    }
    return coded;
  }
};

TEST_F(CodedTopkStore, GivesEverythingBackAndIsSound) {
  Fill();
  ExportTraces(TraceReader(store()), At("plain"), {});
  EXPECT_EQ(Coded(store()), 0);
  Code();
  EXPECT_GT(Coded(store()), static_cast<int>(kChunks * kPerChunk));
  ExpectEverything();
  EXPECT_TRUE(VerifyStore(store()).sound());
  ExportTraces(TraceReader(store()), At("coded"), {});
  EXPECT_EQ(ReadFile(At("plain") / "traces.npz"), ReadFile(At("coded") / "traces.npz"));
}

TEST_F(CodedTopkStore, IsMergedAndSalvaged) {
  Fill();
  Code();
  MergeStores({store(), store()}, At("merged"), {});
  EXPECT_GT(Coded(At("merged")), 0);
  EXPECT_EQ(SalvageStore(store(), At("saved")).lost, 0u);
  const TraceReader merged(At("merged")), saved(At("saved"));
  for (const auto& [id, trace] : All()) {
    EXPECT_EQ(merged.Read(id, WithHidden::kAttended), trace);
    EXPECT_EQ(saved.Read(id, WithHidden::kAttended), trace);
  }
}

TEST_F(CodedTopkStore, HasASchemaThatOlderProgramsRefuse) {
  Json json = config_.ToJson();
  EXPECT_EQ(json["schema"], kCodedTopkSchema);
  EXPECT_TRUE(StoreConfig::FromJson(json, "test").CodesTopk());
  // As older programs wrote it: read, its top-k ids are packed.
  json["schema"] = kCodedSchema;
  EXPECT_NO_THROW(StoreConfig::FromJson(json, "test"));
  json["schema"] = kStoreSchema;
  EXPECT_THROW(StoreConfig::FromJson(json, "test"), DataError);
}

}  // namespace
}  // namespace routecast
