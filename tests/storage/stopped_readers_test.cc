// What only reads, or finishes a store, ends soon where a stop is requested, and leaves
// nothing half made. In processes of their own: a requested stop stays requested.
#include <gtest/gtest.h>
#include <unistd.h>

#include <functional>

#include "common/errors.h"
#include "common/stop.h"
#include "storage/context_trainer.h"
#include "storage/export.h"
#include "storage/held_out_entropy.h"
#include "storage/import.h"
#include "storage/salvage.h"
#include "storage/statistics.h"
#include "storage/statistics_routing.h"
#include "storage/topk_trainer.h"
#include "storage/verify.h"
#include "tests/storage/store_fixture.h"

namespace routecast {
namespace {

class StoppedReadersTest : public TraceStoreTest {
 protected:
  fs::path out() const { return folder_.path() / "out"; }
  // 75: stopped, and `out` holds no file.
  void ExpectStops(const std::function<void()>& work) {
    GTEST_FLAG_SET(death_test_style, "threadsafe");
    const auto stopped = [&] {
      Fill();
      ExportTraces(TraceReader(store()), folder_.path() / "exported", {});
      RequestStop();
      int code = kExitDone;
      try {
        work();
      } catch (const StoppedError&) {
        code = kExitStopped;
      }
      if (fs::exists(out()) && !fs::is_empty(out())) code = kExitDefect;
      fs::remove_all(folder_.path());  // no destructor runs
      ::_exit(code);
    };
    EXPECT_EXIT(stopped(), testing::ExitedWithCode(kExitStopped), "");
  }
};

TEST_F(StoppedReadersTest, ExportOfArrays) {
  ExpectStops([&] { ExportTraces(TraceReader(store()), out(), {}); });
}
TEST_F(StoppedReadersTest, ExportOfText) {
  ExpectStops([&] { ExportTraces(TraceReader(store()), out(), {.format = "csv"}); });
}
TEST_F(StoppedReadersTest, Verify) {
  ExpectStops([&] { VerifyStore(store()); });
}
TEST_F(StoppedReadersTest, Statistics) {
  ExpectStops([&] { ComputeStatistics(TraceReader(store())); });
}
// Of a large store either takes minutes.
TEST_F(StoppedReadersTest, MergingOfFilesAtTheEndOfAStore) {
  ExpectStops([&] { ShardOwner(store(), config_, 0, 1).Compact(); });
}
TEST_F(StoppedReadersTest, SealingOfAStore) {
  config_.num_shards = kChunks;  // a file a shard: nothing is merged
  ExpectStops([&] { ShardOwner(store(), config_, 0, 1).Finish(); });
}
// Each looks itself: counting over many ids takes seconds after the last read.
TEST_F(StoppedReadersTest, HeldOutEntropy) {
  HeldOutEntropy entropy(config_.geometry);
  for (const auto& [id, trace] : All()) entropy.Add(trace);
  ExpectStops([&] { entropy.Bits(); });
}
TEST_F(StoppedReadersTest, CountingOfTheContextModel) {
  ContextTrainer trainer(config_.geometry, {});
  for (const auto& [id, trace] : All()) trainer.Add(Stack::kDecoder, trace.decoder);
  ExpectStops([&] { trainer.Train("test"); });
}
TEST_F(StoppedReadersTest, CountingOfTheTopkModel) {
  TopkTrainer trainer(config_.geometry, {});
  for (const auto& [id, trace] : All()) trainer.Add(Stack::kDecoder, trace.decoder);
  ExpectStops([&] { trainer.Train("test"); });
}
TEST_F(StoppedReadersTest, StatisticsOfRouting) {
  ExpectStops([&] { ComputeRoutingStatistics(TraceReader(store())); });
}
// Nothing of the new store is there while the input is looked at for the first time.
TEST_F(StoppedReadersTest, Import) {
  ExpectStops([&] {
    fs::create_directories(out().string() + ".tmp");
    try {
      ImportTraces(folder_.path() / "exported" / "traces.npz", out(), {});
    } catch (const StoppedError&) {
      if (fs::exists(out().string() + ".tmp")) throw;  // not emptied yet
    }
  });
}
TEST_F(StoppedReadersTest, Salvage) {
  ExpectStops([&] { const Salvage salvage(store()); });
}

}  // namespace
}  // namespace routecast
