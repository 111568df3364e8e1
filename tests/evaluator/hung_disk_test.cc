// A disk that hangs: reads that do not come back end the process by name. The program's
// own pread stands in for the disk; it hides libc's.
#include <gtest/gtest.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <thread>

#include "common/errors.h"
#include "common/files.h"
#include "evaluator/disk_transfer_engine.h"

namespace {
std::atomic<bool> disk_hangs{false};
}  // namespace

extern "C" ssize_t pread(int fd, void* to, size_t size, off_t offset) {
  while (disk_hangs) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  return ::syscall(SYS_pread64, fd, to, size, offset);
}

namespace routecast {
namespace {

class HungDiskTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ =
        fs::temp_directory_path() / ("hung_disk_test." + std::to_string(::getpid()));
    fs::create_directories(folder_);
    ExpertFileSpec spec;
    spec.geometry = {0, 1, 2, 1, 64};
    spec.d_ff = 96;
    spec.content_id = 7;
    WriteSyntheticExperts(folder_ / "experts.bin", spec, {0}, true);
  }
  void TearDown() override { fs::remove_all(folder_); }

  // Asks for an expert while the disk hangs for `hang_seconds`.
  void Read(double deadline_seconds, double hang_seconds) const {
    DiskEngineOptions options;
    options.deadline_seconds = deadline_seconds;
    DiskTransferEngine engine(std::make_shared<ExpertFile>(folder_ / "experts.bin"), 2,
                              options);
    std::atomic<bool> arrived{false};
    engine.SetDone([&](uint64_t, TransferOutcome outcome, uint64_t) {
      arrived = outcome == TransferOutcome::kArrived;
    });
    disk_hangs = true;
    engine.Start({1, {0, 1}, 0, true});
    std::this_thread::sleep_for(std::chrono::duration<double>(hang_seconds));
    disk_hangs = false;
    while (!arrived) std::this_thread::yield();
  }

  fs::path folder_;
};

TEST_F(HungDiskTest, AReadThatDoesNotComeBackEndsTheProcessByName) {
  EXPECT_EXIT(Read(0.1, 60), testing::ExitedWithCode(kExitEnvironment),
              "does not come to an end: .*experts.bin\n.* bytes at .*\n.*the disk hangs");
}

TEST_F(HungDiskTest, ASlowReadIsWaitedFor) { Read(60, 0.05); }

}  // namespace
}  // namespace routecast
