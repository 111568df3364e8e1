#include "evaluator/expert_file.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "common/errors.h"
#include "evaluator/disk_transfer_engine.h"
#include "gtest/gtest.h"

namespace routecast {
namespace {

class ExpertFileTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ =
        fs::temp_directory_path() / ("expert_file_test." + std::to_string(::getpid()));
    fs::create_directories(folder_);
    spec_.geometry = {1, 2, 4, 1, 64};
    spec_.d_ff = 96;
    spec_.content_id = 7;
    WriteSyntheticExperts(path(), spec_, {1, 2}, true);
  }
  void TearDown() override { fs::remove_all(folder_); }
  fs::path path() const { return folder_ / "experts.bin"; }

  void Overwrite(uint64_t offset, char value) {
    std::fstream file(path(), std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(static_cast<std::streamoff>(offset));
    file.put(value);
  }
  std::string Error() {
    try {
      ExpertFile file(path());
    } catch (const DataError& e) {
      return e.what();
    }
    return "";
  }

  fs::path folder_;
  ExpertFileSpec spec_;
};

TEST_F(ExpertFileTest, KeepsSpecAndPlaces) {
  const ExpertFile file(path());
  EXPECT_EQ(file.spec(), spec_);
  EXPECT_EQ(file.count(), 8);
  EXPECT_FALSE(file.Contains({0, 0}));
  ASSERT_TRUE(file.Contains({2, 3}));
  EXPECT_EQ(file.Offset({1, 0}) % 4096, 0u);
  EXPECT_EQ(file.Offset({1, 1}) - file.Offset({1, 0}), spec_.stride_bytes());
}

TEST_F(ExpertFileTest, EveryExpertHasBytesOfItsOwn) {
  const ExpertFile file(path());
  const std::string bytes = ReadFile(path());
  std::map<std::string, int> seen;
  for (int layer : {1, 2}) {
    for (int expert = 0; expert < 4; ++expert) {
      const uint64_t offset = file.Offset({layer, expert});
      file.Check({layer, expert},
                 reinterpret_cast<const std::byte*>(bytes.data()) + offset);
      ++seen[bytes.substr(offset, spec_.blob_bytes())];
    }
  }
  EXPECT_EQ(seen.size(), 8u);
}

TEST_F(ExpertFileTest, WritesTheSameBytesAgain) {
  const std::string first = ReadFile(path());
  WriteSyntheticExperts(path(), spec_, {1, 2}, true);
  EXPECT_EQ(ReadFile(path()), first);
}

TEST_F(ExpertFileTest, RefusesOtherMagic) {
  Overwrite(0, 'X');
  EXPECT_NE(Error().find("magic"), std::string::npos);
}

TEST_F(ExpertFileTest, RefusesAChangedHeader) {
  Overwrite(20, 9);
  EXPECT_NE(Error().find("header checksum"), std::string::npos);
}

TEST_F(ExpertFileTest, RefusesAChangedIndex) {
  Overwrite(fs::file_size(path()) - 1, 'X');
  EXPECT_NE(Error().find("index checksum"), std::string::npos);
}

TEST_F(ExpertFileTest, RefusesACutFile) {
  fs::resize_file(path(), fs::file_size(path()) - 1);
  EXPECT_NE(Error().find("sizes disagree"), std::string::npos);
}

TEST_F(ExpertFileTest, AnUnfinishedFileIsNotThere) {
  fs::remove(path());
  { ExpertFileWriter writer(path(), spec_); }
  EXPECT_TRUE(fs::is_empty(folder_));
}

TEST_F(ExpertFileTest, MissingFileIsUsage) {
  EXPECT_THROW(ExpertFile(folder_ / "nothing"), UsageError);
}

// Collects what an engine reports.
struct Reports {
  std::mutex mutex;
  std::condition_variable changed;
  std::map<uint64_t, TransferOutcome> outcomes;
  std::vector<uint64_t> order;
  void Listen(TransferEngine* engine) {
    engine->SetDone([this](uint64_t id, TransferOutcome outcome, uint64_t) {
      std::lock_guard lock(mutex);
      outcomes[id] = outcome;
      order.push_back(id);
      changed.notify_all();
    });
  }
  TransferOutcome Wait(uint64_t id) {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return outcomes.count(id) > 0; });
    return outcomes[id];
  }
};

TEST_F(ExpertFileTest, EngineBringsTheBytesOfEachExpert) {
  const auto file = std::make_shared<ExpertFile>(path());
  Reports reports;
  DiskTransferEngine engine(file, 8, {2, 4096, 0, true});
  reports.Listen(&engine);
  for (int i = 0; i < 8; ++i) {
    engine.Start({static_cast<uint64_t>(i), {1 + i / 4, i % 4}, i, i % 2 == 0});
  }
  for (int i = 0; i < 8; ++i) {
    ASSERT_EQ(reports.Wait(i), TransferOutcome::kArrived);
    file->Check({1 + i / 4, i % 4}, engine.slot(i));
  }
}

TEST_F(ExpertFileTest, EngineReportsADamagedExpert) {
  const auto file = std::make_shared<ExpertFile>(path());
  Overwrite(file->Offset({2, 1}) + 100, 'X');
  Reports reports;
  DiskTransferEngine engine(file, 2, {2, 1 << 20, 0, true});
  reports.Listen(&engine);
  engine.Start({5, {2, 1}, 0, true});
  EXPECT_EQ(reports.Wait(5), TransferOutcome::kFailed);
  EXPECT_NE(engine.last_error().find("layer 2 expert 1"), std::string::npos);
}

// Unless it is asked for, at the first read alone: until the expert was right once.
TEST_F(ExpertFileTest, EngineComparesWhatItReadsFirst) {
  const auto file = std::make_shared<ExpertFile>(path());
  Overwrite(file->Offset({2, 1}) + 100, 'X');
  Reports reports;
  DiskTransferEngine engine(file, 2, {});
  reports.Listen(&engine);
  for (const uint64_t id : {5u, 6u}) {
    engine.Start({id, {2, 1}, 0, true});
    EXPECT_EQ(reports.Wait(id), TransferOutcome::kFailed);
    EXPECT_NE(engine.last_error().find("layer 2 expert 1"), std::string::npos);
  }
}

TEST_F(ExpertFileTest, EngineComparesAgainWhatChangesWhileItRuns) {
  const auto file = std::make_shared<ExpertFile>(path());
  Reports reports;
  DiskTransferEngine engine(file, 2, {});
  reports.Listen(&engine);
  engine.Start({1, {2, 1}, 0, true});
  ASSERT_EQ(reports.Wait(1), TransferOutcome::kArrived);
  Overwrite(file->Offset({2, 1}) + 100, 'X');
  // Two writes may lie within one tick of the file system's clock.
  fs::last_write_time(path(), fs::file_time_type::clock::now() + std::chrono::seconds(2));
  engine.Start({2, {2, 1}, 0, true});
  EXPECT_EQ(reports.Wait(2), TransferOutcome::kFailed);
  EXPECT_NE(engine.last_error().find("layer 2 expert 1"), std::string::npos);
}

TEST_F(ExpertFileTest, PacedDemandOvertakesSpeculation) {
  const auto file = std::make_shared<ExpertFile>(path());
  Reports reports;
  // 12 chunks an expert, 10 ms a chunk: the demand comes long before the speculation's
  // end.
  DiskTransferEngine engine(file, 2, {1, 4096, 4096 / 0.01, false});
  reports.Listen(&engine);
  engine.Start({1, {1, 0}, 0, false});
  engine.Start({2, {1, 1}, 1, true});
  reports.Wait(1);
  reports.Wait(2);
  EXPECT_EQ(reports.order, (std::vector<uint64_t>{2, 1}));
}

TEST_F(ExpertFileTest, APromotedSpeculationOvertakesTheOneBeforeIt) {
  const auto file = std::make_shared<ExpertFile>(path());
  Reports reports;
  DiskTransferEngine engine(file, 2, {1, 4096, 4096 / 0.01, false});
  reports.Listen(&engine);
  engine.Start({1, {1, 0}, 0, false});
  engine.Start({2, {1, 1}, 1, false});
  engine.Promote(2);
  reports.Wait(1);
  reports.Wait(2);
  EXPECT_EQ(reports.order, (std::vector<uint64_t>{2, 1}));
}

TEST_F(ExpertFileTest, CancelledSpeculationGivesTheLinkBack) {
  const auto file = std::make_shared<ExpertFile>(path());
  Reports reports;
  DiskTransferEngine engine(file, 2, {1, 4096, 4096 / 0.01, false});
  reports.Listen(&engine);
  engine.Start({1, {1, 0}, 0, false});
  engine.Cancel(1);
  EXPECT_EQ(reports.Wait(1), TransferOutcome::kCancelled);
}

TEST_F(ExpertFileTest, PaceIsKept) {
  const auto file = std::make_shared<ExpertFile>(path());
  Reports reports;
  const double pace = static_cast<double>(spec_.stride_bytes()) / 0.05;
  DiskTransferEngine engine(file, 4, {3, 8192, pace, false});
  reports.Listen(&engine);
  const SteadyClock clock;
  for (uint64_t i = 0; i < 4; ++i)
    engine.Start({i, {1, static_cast<int>(i)}, int(i), true});
  for (uint64_t i = 0; i < 4; ++i) reports.Wait(i);
  // Four experts of 50 ms on a serial link; later only by what a loaded machine adds.
  EXPECT_GE(clock.Now(), 0.195);
}

// A link that was idle has saved no time up: experts that come alone take theirs too.
TEST_F(ExpertFileTest, PaceIsKeptAfterIdleness) {
  const auto file = std::make_shared<ExpertFile>(path());
  Reports reports;
  constexpr double kSeconds = 0.001;  // of an expert
  const double pace = static_cast<double>(spec_.stride_bytes()) / kSeconds;
  DiskTransferEngine engine(file, 1, {1, 1 << 20, pace, false});
  reports.Listen(&engine);
  const SteadyClock clock;
  double least = 1;
  for (uint64_t i = 0; i < 20; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    const double started = clock.Now();
    engine.Start({i, {1, static_cast<int>(i % 4)}, 0, true});
    reports.Wait(i);
    least = std::min(least, clock.Now() - started);
  }
  EXPECT_GE(least, kSeconds - 1e-6);
}

// Ends its first order behind five others.
class LateFirst final : public LinkEngine {
 public:
  ~LateFirst() override {
    for (std::thread& t : threads_) t.join();
  }
  void SetDone(Done done) override { done_ = std::move(done); }
  void Start(const TransferOrder& order) override {
    {
      const std::lock_guard lock(mutex_);
      twice = twice || !busy_.insert(order.slot).second;
    }
    threads_.emplace_back([this, order] { End(order); });
  }
  void Promote(uint64_t) override {}
  void Cancel(uint64_t) override {}
  bool can_cancel() const override { return false; }
  std::byte* slot(int) const override { return nullptr; }
  std::string description() const override { return ""; }
  void SetPace(double) override {}
  bool twice = false;  // a slot was asked for while an order filled it

 private:
  void End(const TransferOrder& order) {
    std::unique_lock lock(mutex_);
    if (order.id == 0) ended_.wait(lock, [this] { return count_ >= 5; });
    ++count_;
    busy_.erase(order.slot);
    ended_.notify_all();
    done_(order.id, TransferOutcome::kArrived, 1);
  }
  Done done_;
  std::mutex mutex_;
  std::condition_variable ended_;
  std::set<int> busy_;
  int count_ = 0;
  std::vector<std::thread> threads_;
};

TEST(MeasurePeak, NeverFillsASlotThatIsBeingFilled) {
  const std::vector<ExpertKey> keys = {{0, 0}, {0, 1}};
  LateFirst engine;
  MeasurePeak(&engine, keys, 4, /*seconds=*/0, /*least=*/8);
  EXPECT_FALSE(engine.twice);
}

TEST_F(ExpertFileTest, PeakIsMeasuredUnpaced) {
  const auto file = std::make_shared<ExpertFile>(path());
  DiskTransferEngine engine(file, 4, {2, 1 << 20, 1000, false});
  EXPECT_GT(MeasurePeak(&engine, file->keys(), 4, 0.05), 1e5);
}

}  // namespace
}  // namespace routecast
