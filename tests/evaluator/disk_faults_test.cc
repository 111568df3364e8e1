// A disk that hangs, fails, or reads less than it was asked for. The program's own pread
// stands in for the disk; it hides libc's.
#include <gtest/gtest.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <future>
#include <memory>
#include <string>
#include <thread>

#include "common/errors.h"
#include "common/files.h"
#include "common/recorded_run.h"
#include "evaluator/disk_transfer_engine.h"

namespace {
enum class Disk { kGood, kHangs, kFails, kReadsLess };
std::atomic<Disk> disk{Disk::kGood};
}  // namespace

extern "C" ssize_t pread(int fd, void* to, size_t size, off_t offset) {
  while (disk == Disk::kHangs) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  if (disk == Disk::kFails) {
    errno = EIO;
    return -1;
  }
  if (disk == Disk::kReadsLess) size = std::min<size_t>(size, 4096);
  return ::syscall(SYS_pread64, fd, to, size, offset);
}

namespace routecast {
namespace {

class DiskFaultsTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ =
        fs::temp_directory_path() / ("disk_faults_test." + std::to_string(::getpid()));
    fs::create_directories(folder_);
    ExpertFileSpec spec;
    spec.geometry = {0, 1, 2, 1, 64};
    spec.d_ff = 96;
    spec.content_id = 7;
    WriteSyntheticExperts(folder_ / "experts.bin", spec, {0}, true);
  }
  void TearDown() override {
    disk = Disk::kGood;
    fs::remove_all(folder_);
  }

  // Asks for an expert of a disk that is `kind` for `seconds`; what became of it.
  TransferOutcome Read(Disk kind, double seconds, double deadline_seconds,
                       std::string* error, uint64_t cut_to = 0) const {
    DiskEngineOptions options;
    options.deadline_seconds = deadline_seconds;
    options.check_hashes = true;
    std::promise<TransferOutcome> over;
    DiskTransferEngine engine(std::make_shared<ExpertFile>(folder_ / "experts.bin"), 2,
                              options);
    engine.SetDone(
        [&](uint64_t, TransferOutcome outcome, uint64_t) { over.set_value(outcome); });
    if (cut_to > 0) fs::resize_file(folder_ / "experts.bin", cut_to);
    disk = kind;
    engine.Start({1, {0, 1}, 0, true});
    std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
    if (kind == Disk::kHangs) disk = Disk::kGood;
    const TransferOutcome outcome = over.get_future().get();
    *error = engine.last_error();
    return outcome;
  }

  fs::path folder_;
};

TEST_F(DiskFaultsTest, AReadThatDoesNotComeBackEndsTheProcessByName) {
  std::string error;
  EXPECT_EXIT(Read(Disk::kHangs, 60, 0.1, &error),
              testing::ExitedWithCode(kExitEnvironment),
              "does not come to an end: .*experts.bin\n.* bytes at .*\n.*the disk hangs");
}

TEST_F(DiskFaultsTest, TheRecordSaysHowSuchARunEnded) {
  RecordedRun run(folder_ / "out", "test", Json::object());
  run.Start();
  EXPECT_TRUE(ReadJsonFile(folder_ / "out" / "run.json")["exit_status"].is_null());
  std::string error;
  EXPECT_EXIT(Read(Disk::kHangs, 60, 0.1, &error),
              testing::ExitedWithCode(kExitEnvironment), "");
  const Json record = ReadJsonFile(folder_ / "out" / "run.json");
  EXPECT_EQ(record["exit_status"], kExitEnvironment);
  EXPECT_FALSE(record["end"].is_null());
}

TEST_F(DiskFaultsTest, ASlowReadIsWaitedFor) {
  std::string error;
  EXPECT_EQ(Read(Disk::kHangs, 0.05, 60, &error), TransferOutcome::kArrived) << error;
}

TEST_F(DiskFaultsTest, AReadThatFailsIsNamed) {
  std::string error;
  EXPECT_EQ(Read(Disk::kFails, 0, 60, &error), TransferOutcome::kFailed);
  EXPECT_NE(error.find("experts.bin"), std::string::npos) << error;
}

TEST_F(DiskFaultsTest, WhatIsLeftOfAShortReadIsReadAsWell) {
  std::string error;
  EXPECT_EQ(Read(Disk::kReadsLess, 0, 60, &error), TransferOutcome::kArrived) << error;
}

// Within a page, too, where direct reads cannot go on from.
TEST_F(DiskFaultsTest, AFileThatIsCutWhileItIsOpenIsNamed) {
  const uint64_t first = 4096 + 2 * 64 * 96 * 4;  // of the second expert
  for (const uint64_t cut_to : {first + 8192 + 100, first + 8192, first}) {
    std::string error;
    EXPECT_EQ(Read(Disk::kGood, 0, 60, &error, cut_to), TransferOutcome::kFailed);
    EXPECT_NE(error.find("cut expert file"), std::string::npos) << error;
    EXPECT_NE(error.find("no byte at " + std::to_string(cut_to)), std::string::npos)
        << error;
    TearDown();
    SetUp();
  }
}

}  // namespace
}  // namespace routecast
