// index.cache: what a reader learns from it is what the marks say, or it is made anew.
#include "storage/index_cache.h"

#include <gtest/gtest.h>

#include <cstring>
#include <fstream>

#include "storage/trace_reader.h"
#include "storage/verify.h"
#include "tests/storage/store_fixture.h"

namespace routecast {
namespace {

constexpr uint64_t kFew = 4;  // chunks

class IndexCacheTest : public testing::Test {
 protected:
  IndexCacheTest() {
    config_.geometry = {0, 1, 2, 1, 0};
    config_.num_shards = 3;
    config_.num_chunks = kFew;
    TraceStore::CreateOrOpen(store(), config_);
  }
  fs::path store() const { return folder_.path() / "store"; }
  fs::path cache() const { return IndexCachePath(store()); }
  // Ids are spread over the chunks.
  void AddChunk(uint32_t chunk, uint64_t sequences) {
    ChunkWriter writer(store(), config_, chunk, "t");
    for (uint64_t i = 0; i < sequences; ++i) {
      RoutingTrace t;
      t.sequence_id = (i * kFew + chunk) << 16;
      t.document_id = i * kFew + chunk;
      t.group_id = Mix(i, chunk);
      t.decoder.num_tokens = t.decoder.num_layers = 1;
      t.decoder.token_ids = {static_cast<uint32_t>(i)};
      t.decoder.expert_ids = {static_cast<uint16_t>(i % 2)};
      writer.Add(t);
    }
    writer.Finish();
    ShardOwner(store(), config_, 0, 1).Ingest(chunk, "t");
  }
  void Fill(uint64_t sequences = kMinCachedSequences / kFew) {
    for (uint32_t c = 0; c < kFew; ++c) AddChunk(c, sequences);
  }
  // Of a reader now; and the places work.
  std::vector<SequenceInfo> Sequences() const {
    const TraceReader reader(store());
    EXPECT_TRUE(reader.complete());
    for (const size_t i : {size_t{0}, size_t{77}, reader.sequences().size() - 1}) {
      const SequenceInfo& s = reader.sequences()[i];
      const RoutingTrace t = reader.Read(s.sequence_id, WithHidden::kNo);
      EXPECT_EQ(t.decoder.token_ids[0], s.document_id / kFew);
    }
    return reader.sequences();
  }
  std::string Bytes() const { return ReadFile(cache()); }

  TempFolder folder_;
  StoreConfig config_;
};

TEST_F(IndexCacheTest, GivesTheSameSequences) {
  Fill();
  EXPECT_FALSE(fs::exists(cache()));
  const auto first = Sequences();
  ASSERT_TRUE(fs::exists(cache()));
  const std::string bytes = Bytes();
  const auto from_cache = Sequences();
  EXPECT_EQ(from_cache, first);
  EXPECT_EQ(Bytes(), bytes);
  EXPECT_TRUE(VerifyStore(store()).sound());
}

// The reader does look there: other rows under a right checksum are what it says.
TEST_F(IndexCacheTest, IsReadWhereItFits) {
  Fill();
  Sequences();
  const TraceReader reader(store());
  StoreIndex index{reader.sequences(), {}, kFew};
  for (const SequenceInfo& s : index.sequences) {
    index.chunks.push_back(static_cast<uint32_t>(s.document_id % kFew));
  }
  index.sequences[5].group_id = 99;
  uint64_t state;
  std::memcpy(&state, Bytes().data() + 8, 8);
  SaveIndexCache(store(), state, index);
  EXPECT_EQ(Sequences()[5].group_id, 99u);
}

TEST_F(IndexCacheTest, AnyFlippedOrCutByteMakesItAnew) {
  Fill();
  const auto all = Sequences();
  const std::string good = Bytes();
  for (uint64_t seed = 0; seed < 40; ++seed) {
    std::string bad = good;
    // The header's bytes, and some of the rows'.
    const size_t at = seed < 20 ? 2 * seed : ToRange(Mix(seed), bad.size());
    if (seed % 4 == 3) {
      bad.resize(at);
    } else {
      bad[at] = static_cast<char>(bad[at] ^ (1 << seed % 8));
    }
    std::ofstream(cache(), std::ios::binary) << bad;
    ASSERT_TRUE(Sequences() == all) << seed;
    ASSERT_TRUE(Bytes() == good) << seed;
  }
}

TEST_F(IndexCacheTest, AnOlderStateIsNotBelieved) {
  Fill();
  Sequences();
  const std::string old = Bytes();
  fs::remove_all(store());
  TraceStore::CreateOrOpen(store(), config_);
  Fill(kMinCachedSequences / kFew + 3);
  std::ofstream(cache(), std::ios::binary) << old;
  EXPECT_EQ(Sequences().size(), kMinCachedSequences + 3 * kFew);
  EXPECT_NE(Bytes(), old);
  const std::string before = Bytes();
  ShardOwner(store(), config_, 0, 1).Compact();  // other files, the same sequences
  EXPECT_EQ(Sequences().size(), kMinCachedSequences + 3 * kFew);
  EXPECT_NE(Bytes(), before);
}

TEST_F(IndexCacheTest, UnfinishedAndSmallStoresHaveNone) {
  for (uint32_t c = 0; c + 1 < kFew; ++c) AddChunk(c, kMinCachedSequences);
  EXPECT_FALSE(TraceReader(store()).complete());
  EXPECT_FALSE(fs::exists(cache()));
  fs::remove_all(store());
  TraceStore::CreateOrOpen(store(), config_);
  Fill(kMinCachedSequences / kFew - 1);
  Sequences();
  EXPECT_FALSE(fs::exists(cache()));
}

TEST_F(IndexCacheTest, WhereItCannotBeWrittenTheStoreIsReadAllTheSame) {
  Fill();
  MakeFolder(cache());  // a folder is in the way
  EXPECT_EQ(Sequences().size(), kMinCachedSequences);
  EXPECT_TRUE(fs::is_directory(cache()));
}

}  // namespace
}  // namespace routecast
