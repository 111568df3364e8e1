// Sequences that were left out: their chunk names them, and nothing else knows them.
#include <gtest/gtest.h>

#include "common/errors.h"
#include "storage/context_coder.h"
#include "storage/index_cache.h"
#include "storage/merge.h"
#include "storage/salvage.h"
#include "storage/subset.h"
#include "storage/verify.h"
#include "tests/storage/store_fixture.h"

namespace routecast {
namespace {

class LeftOutTest : public TraceStoreTest {
 protected:
  static RoutingTrace Without(uint64_t sequence, uint64_t group) {
    RoutingTrace none;
    none.sequence_id = sequence;
    none.document_id = sequence >> 16;
    none.group_id = group;
    return none;
  }
  // A chunk a list; every third sequence is left out.
  void Write(const std::vector<std::vector<uint64_t>>& chunks) {
    config_.num_chunks = static_cast<int64_t>(chunks.size());
    Create();
    ShardOwner owner(store(), config_, 0, 1);
    for (uint32_t c = 0; c < chunks.size(); ++c) {
      ChunkWriter writer(store(), config_, c, "t");
      for (const uint64_t id : chunks[c]) {
        RoutingTrace trace = RandomTrace(id, shape_);
        if (id % 3 != 0) {
          writer.Add(trace);
          kept_.push_back(trace);
        } else {
          writer.Add(Without(id, trace.group_id));
          left_out_.push_back({id, id >> 16, trace.group_id, 0, 0, false});
        }
      }
      writer.Finish();
      owner.Ingest(c, "t");
    }
    DeclareLeftOut(store());
    MakeContextModel(store(), config_);
    owner.Finish();
  }
  static int SchemaOf(const fs::path& store) {
    return ReadJsonFile(store / "store.json")["schema"];
  }
  void ExpectThem(const fs::path& store) {
    const TraceReader reader(store);
    EXPECT_TRUE(reader.complete());
    EXPECT_EQ(reader.left_out(), left_out_);
    std::vector<RoutingTrace> read;
    reader.Scan([&](RoutingTrace&& t) { read.push_back(std::move(t)); },
                WithHidden::kAttended);
    EXPECT_EQ(read, kept_);
    for (const SequenceInfo& info : left_out_) {
      EXPECT_THROW(reader.Read(info.sequence_id, WithHidden::kNo), UsageError);
    }
    const VerifyReport report = VerifyStore(store);
    EXPECT_TRUE(report.sound()) << report.problems.at(0);
    EXPECT_EQ(report.left_out, left_out_.size());
    EXPECT_EQ(report.sequences, kept_.size());
  }
  // A store of one chunk beside the first, with these sequences and names of others.
  fs::path Beside(const std::string& name, const std::vector<uint64_t>& held,
                  const std::vector<uint64_t>& left_out) {
    config_.num_chunks = 1;
    TraceStore::CreateOrOpen(At(name), config_);
    ShardOwner owner(At(name), config_, 0, 1);
    ChunkWriter writer(At(name), config_, 0, "t");
    for (const uint64_t id : held) writer.Add(RandomTrace(id, shape_));
    for (const uint64_t id : left_out) {
      writer.Add(Without(id, RandomTrace(id, shape_).group_id));
    }
    writer.Finish();
    owner.Ingest(0, "t");
    owner.Finish();
    return At(name);
  }
  // As a merge holds it that puts `documents` before its corpus.
  void ExpectMoved(uint64_t id, uint64_t documents) {
    RoutingTrace trace = RandomTrace(id, shape_);
    trace.sequence_id += documents << 16;
    trace.document_id += documents;
    kept_.push_back(trace);
  }
  fs::path At(const std::string& name) const { return folder_.path() / name; }

  std::vector<RoutingTrace> kept_;
  std::vector<SequenceInfo> left_out_;
};

TEST_F(LeftOutTest, ReaderAndVerifyNameThem) {
  Write({{1, 2, 3, 4}, {5, 6, 7}});
  ExpectThem(store());
}

// Programs from before would take them for sequences of no tokens.
TEST_F(LeftOutTest, AStoreThatLacksSomeHasASchemaOfItsOwn) {
  Write({{1, 2, 3, 4}});
  EXPECT_EQ(SchemaOf(store()), kLeftOutSchema);
  TraceStore::CreateOrOpen(store(), config_);  // what is left out is no other setting
  SubsetStore(store(), At("subset"), {.share = 1});
  EXPECT_EQ(SchemaOf(At("subset")), kLeftOutSchema);
  Beside("beside", {3}, {});
  MergeStores({store(), At("beside")}, At("merged"), {});
  EXPECT_EQ(SchemaOf(At("merged")), SchemaOf(At("beside")));
  EXPECT_LT(SchemaOf(At("beside")), kLeftOutSchema);
}

TEST_F(LeftOutTest, AChunkMayHoldNothingElse) {
  Write({{1, 2}, {3, 6}});
  ExpectThem(store());
}

TEST_F(LeftOutTest, SoMayAStore) {
  config_.compression = "context";
  Write({{3, 6}});
  ExpectThem(store());
}

TEST_F(LeftOutTest, CodedIdsKeepThem) {
  config_.compression = "context";
  Write({{1, 2, 3, 4}, {5, 6, 7}});
  ExpectThem(store());
}

TEST_F(LeftOutTest, TheCachedIndexKeepsThem) {
  shape_ = {
      .num_experts = 2, .layers = 1, .top_k = 0, .max_tokens = 1, .hidden_share = 0};
  config_ = ConfigOf(shape_, 1, 1);
  std::vector<uint64_t> ids;
  for (uint64_t id = 1; ids.size() < 2 * kMinCachedSequences; ++id) ids.push_back(id);
  Write({ids});
  EXPECT_EQ(TraceReader(store()).left_out(), left_out_);
  ASSERT_TRUE(fs::exists(IndexCachePath(store())));
  const TraceReader cached(store());
  EXPECT_EQ(cached.left_out(), left_out_);
  EXPECT_EQ(cached.sequences().size(), kept_.size());
}

TEST_F(LeftOutTest, SubsetMergeAndSalvageKeepThem) {
  Write({{1, 2, 3, 4}, {5, 6, 7}});
  SubsetStore(store(), At("subset"), {.share = 1});
  ExpectThem(At("subset"));
  MergeStores({store(), At("subset")}, At("merged"), {});
  ExpectThem(At("merged"));
  SalvageStore(store(), At("salvaged"));
  ExpectThem(At("salvaged"));
}

TEST_F(LeftOutTest, AMergeHoldsWhatOneStoreHolds) {
  Write({{1, 2, 3, 4}, {5, 6, 7}});
  Beside("beside", {3, 8}, {9});
  MergeStores({store(), At("beside")}, At("merged"), {});
  MergeStores({At("beside"), store()}, At("other_order"), {});
  kept_.insert(kept_.begin() + 2, RandomTrace(3, shape_));
  kept_.push_back(RandomTrace(8, shape_));
  left_out_.erase(left_out_.begin());  // 3
  left_out_.push_back({9, 0, RandomTrace(9, shape_).group_id, 0, 0, false});
  ExpectThem(At("merged"));
  ExpectThem(At("other_order"));
}

// The first corpus is documents 0, 1 and 2: an id of the second is another, though one of
// the first has its number.
TEST_F(LeftOutTest, ARenumberedMergeMovesThem) {
  Write({{1, 2, 3, 4}, {5, 6, 7}});
  config_.corpus_fingerprint = "other";
  Beside("beside", {3, 8}, {2, 6});
  MergeStores({store(), At("beside")}, At("merged"), {.renumber = true});
  ExpectMoved(3, 3);
  ExpectMoved(8, 3);
  for (const uint64_t id : {2, 6}) {
    left_out_.push_back(
        {id + 3 * 65536, 3, RandomTrace(id, shape_).group_id, 0, 0, false});
  }
  ExpectThem(At("merged"));
}

TEST_F(LeftOutTest, ASubsetNamesThoseOfItsGroups) {
  const SubsetOptions half = {.share = 0.5};
  Write({{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, {11, 12, 13, 14, 15, 16, 17, 18}});
  const size_t all_kept = kept_.size(), all_left_out = left_out_.size();
  const auto not_drawn = [&half](const auto& s) { return !InSubset(s.group_id, half); };
  std::erase_if(kept_, not_drawn);
  std::erase_if(left_out_, not_drawn);
  ASSERT_TRUE(!kept_.empty() && kept_.size() < all_kept);
  ASSERT_TRUE(!left_out_.empty() && left_out_.size() < all_left_out);
  SubsetStore(store(), At("subset"), half);
  ExpectThem(At("subset"));
}

}  // namespace
}  // namespace routecast
