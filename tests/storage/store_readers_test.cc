// Readers beside a writer: any number of them, at any moment of a job.
#include <atomic>
#include <thread>

#include "tests/storage/store_fixture.h"

namespace routecast {
namespace {

constexpr int64_t kManyChunks = 24;
constexpr int kReaders = 3;

class StoreReadersTest : public TraceStoreTest {
 protected:
  StoreReadersTest() { config_.num_chunks = kManyChunks; }
  void Write() {
    ShardOwner owner(store(), config_, 0, 1);
    for (uint32_t c = 0; c < kManyChunks; ++c) {
      StageChunk(store(), config_, c, kPerChunk, shape_, "t");
      owner.Ingest(c, "t");
    }
    owner.Finish();
  }
  // Opens and reads the store until it is complete. What is in it is whole, and no less
  // than before. Returns how often it was opened.
  int ReadOnAndOn(const std::atomic<bool>& done) {
    int opened = 0;
    int64_t before = 0;
    for (bool last = false; !last;) {
      last = done;  // once more after the end
      const TraceReader reader(store());
      ++opened;
      EXPECT_GE(reader.completed_chunks(), before);
      before = reader.completed_chunks();
      EXPECT_EQ(reader.sequences().size(), static_cast<uint64_t>(before) * kPerChunk);
      reader.Scan(
          [&](RoutingTrace&& t) { EXPECT_EQ(t, RandomTrace(t.sequence_id, shape_)); },
          WithHidden::kYes);
    }
    EXPECT_EQ(before, kManyChunks);
    return opened;
  }
};

TEST_F(StoreReadersTest, ReadWholeChunksWhileAWriterWorks) {
  Create();
  std::atomic<bool> done = false;
  std::vector<std::thread> readers;
  std::atomic<int> opened = 0, failed = 0;
  for (int r = 0; r < kReaders; ++r) {
    readers.emplace_back([&] {
      try {
        opened += ReadOnAndOn(done);
      } catch (const std::exception& e) {
        ++failed;
        ADD_FAILURE() << e.what();
      }
    });
  }
  // Twice: the second job opens a complete store, as a restarted command does.
  Write();
  Write();
  done = true;
  for (std::thread& reader : readers) reader.join();
  EXPECT_EQ(failed, 0);
  EXPECT_GT(opened, kReaders);
}

}  // namespace
}  // namespace routecast
