// A small store in a folder of its own, and what must be in it.
#pragma once

#include <gtest/gtest.h>

#include <map>

#include "storage/trace_reader.h"
#include "storage/trace_store.h"
#include "tests/storage/random_trace.h"
#include "tests/storage/temp_folder.h"

namespace routecast {

inline constexpr int64_t kChunks = 6;
inline constexpr uint64_t kPerChunk = 9;

class TraceStoreTest : public testing::Test {
 protected:
  fs::path store() const { return folder_.path() / "store"; }
  void Create() { TraceStore::CreateOrOpen(store(), config_); }
  void Fill(int64_t chunks = kChunks) {
    Create();
    ShardOwner owner(store(), config_, 0, 1);
    for (uint32_t c = 0; c < chunks; ++c) {
      StageChunk(store(), config_, c, kPerChunk, shape_, "t");
      ASSERT_TRUE(owner.Ingest(c, "t"));
    }
  }
  std::map<uint64_t, RoutingTrace> All() const {
    std::map<uint64_t, RoutingTrace> all;
    for (uint32_t c = 0; c < kChunks; ++c)
      all.merge(ChunkTraces(c, kChunks, kPerChunk, shape_));
    return all;
  }
  void ExpectEverything() {
    const auto all = All();
    const TraceReader reader(store());
    EXPECT_TRUE(reader.complete());
    ASSERT_EQ(reader.sequences().size(), all.size());
    auto expected = all.begin();
    reader.Scan([&](RoutingTrace&& t) { EXPECT_EQ(t, expected++->second); },
                WithHidden::kAttended);
    EXPECT_EQ(expected, all.end());
  }

  TempFolder folder_;
  TraceShape shape_;
  StoreConfig config_ = ConfigOf(shape_, 4, kChunks);
};

}  // namespace routecast
