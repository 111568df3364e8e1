// What writes whole files and folders (checkpoints, configurations, indexes), with every
// file call failing in turn and power lost after each: the newest is the last or the one
// before, never a part of one.
#include <gtest/gtest.h>

#include <algorithm>

#include "common/errors.h"
#include "common/run_record.h"
#include "common/safetensors.h"
#include "tests/storage/temp_folder.h"
#include "tests/support/watched_files.h"

namespace routecast {
namespace {

class FileFaultsTest : public testing::Test {
 protected:
  fs::path disk() const { return folder_.path() / "disk"; }
  fs::path StepPath(int step) const {
    return disk() / "run" / ("step-" + std::to_string(step));
  }
  // A checkpoint as the trainers write one, and a file that is replaced each time.
  void Save(int step) {
    MakeFolder(disk() / "run");
    SealedFolder sealed(StepPath(step));
    const std::vector<float> weights(300, static_cast<float>(step));
    WriteSafetensors(sealed.path() / "weights.safetensors",
                     {{"w", "F32", {300}, weights.data()}});
    WriteFileAtomic(sealed.path() / "state.json",
                    "{\"step\": " + std::to_string(step) + "}");
    sealed.Commit();
    WriteFileAtomic(disk() / "run" / "newest", std::to_string(step));
  }
  void Job(FileWatch* watch) {
    for (int step = 1; step <= 2; ++step) {
      Save(step);
      if (watch != nullptr) watch->Promise();
    }
  }
  void Empty() {
    fs::remove_all(disk());
    fs::create_directories(disk());
  }
  // The newest step that is there; fails where one is there in part.
  int Newest() {
    int newest = 0;
    for (int step = 1; step <= 2; ++step) {
      if (!fs::exists(StepPath(step))) continue;
      EXPECT_EQ(ReadJsonFile(StepPath(step) / "state.json")["step"], step);
      const fs::path file = StepPath(step) / "weights.safetensors";
      const SafetensorsIndex index = ReadSafetensorsIndex(file);
      const std::vector<float> weights(300, static_cast<float>(step));
      EXPECT_EQ(ReadTensorBytes(file, index.tensors.at(0)),
                std::string(reinterpret_cast<const char*>(weights.data()), 1200));
      newest = step;
    }
    return newest;
  }
  // The replaced file: whole, of `promised` saves or one more.
  void ExpectReplacedFile(int promised) {
    const fs::path file = disk() / "run" / "newest";
    if (!fs::exists(file)) {
      EXPECT_EQ(promised, 0);
      return;
    }
    const std::string text = ReadFile(file);
    EXPECT_TRUE(text == std::to_string(promised) || text == std::to_string(promised + 1))
        << text << " after " << promised;
  }
  void FailAtEvery(Fault fault);
  void LosePowerEverywhere(Lost lost);
  void ReplaceUnderKills(Fault fault);

  TempFolder folder_;
};

void FileFaultsTest::FailAtEvery(Fault fault) {
  Empty();
  std::vector<SeenCall> calls;
  {
    FileWatch watch(disk());
    Job(nullptr);
    calls = watch.calls();
  }
  int faults = 0;
  for (size_t n = 0; n < calls.size(); ++n) {
    if (!Applies(fault, calls[n].call)) continue;
    SCOPED_TRACE("call " + std::to_string(n) + ": " + FileCallName(calls[n].call) + " " +
                 calls[n].path);
    Empty();
    bool failed = false;
    {
      FileWatch watch(disk(), static_cast<int64_t>(n), fault);
      try {
        Job(nullptr);
      } catch (const EnvironmentError& e) {
        failed = true;
        EXPECT_NE(std::string(e.what()).find(disk().string()), std::string::npos)
            << e.what();
      }
      EXPECT_TRUE(watch.fired());
    }
    ++faults;
    EXPECT_TRUE(!failed || fault != Fault::kPartial);
    EXPECT_GE(Newest(), failed ? 0 : 2);
    Job(nullptr);
    EXPECT_EQ(Newest(), 2);
    // Nothing temporary is left where the next attempt has been through.
    for (const auto& entry : fs::directory_iterator(disk() / "run")) {
      EXPECT_NE(entry.path().extension(), ".tmp") << entry.path();
    }
  }
  EXPECT_GE(faults, 6);
}

void FileFaultsTest::LosePowerEverywhere(Lost lost) {
  Empty();
  std::vector<int> promises;
  std::vector<DiskState> disks;
  {
    FileWatch watch(disk());
    Job(&watch);
    disks = watch.PowerLosses(lost, &promises);
  }
  ASSERT_GT(disks.size(), 5u);
  for (size_t i = 0; i < disks.size(); ++i) {
    SCOPED_TRACE("disk " + std::to_string(i));
    fs::remove_all(disk());
    disks[i].WriteTo(disk());
    const int newest = Newest();
    EXPECT_GE(newest, promises[i]);
    EXPECT_LE(newest, promises[i] + 1);
    ExpectReplacedFile(promises[i]);
  }
}

// A folder that is sealed twice under one name: a kill after any call leaves the first or
// the second there. Without exchanges of names there is one moment with neither.
void FileFaultsTest::ReplaceUnderKills(Fault fault) {
  const auto replace = [&](const char* text) {
    SealedFolder sealed(disk() / "out");
    WriteFileAtomic(sealed.path() / "text", text);
    sealed.Commit();
  };
  Empty();
  int64_t exchange = -1;
  {
    FileWatch watch(disk());
    replace("1");
    replace("2");
    for (size_t n = 0; n < watch.calls().size(); ++n) {
      if (watch.calls()[n].call == FileCall::kExchange)
        exchange = static_cast<int64_t>(n);
    }
  }
  ASSERT_GE(exchange, 0);
  Empty();
  std::vector<int> promises;
  std::vector<DiskState> disks;
  {
    FileWatch watch(disk(), exchange, fault);
    replace("1");
    watch.Promise();
    replace("2");
    watch.Promise();
    EXPECT_EQ(watch.fired(), fault != Fault::kNone);
    disks = watch.PowerLosses(Lost::kNothing, &promises);
  }
  EXPECT_EQ(ReadFile(disk() / "out" / "text"), "2");
  EXPECT_EQ(std::distance(fs::directory_iterator(disk()), fs::directory_iterator()), 1);
  int absent = 0;
  for (size_t i = 0; i < disks.size(); ++i) {
    if (promises[i] == 0) continue;
    const auto text = disks[i].files.find("out/text");
    if (text == disks[i].files.end()) {
      ++absent;
    } else if (promises[i] == 2) {
      EXPECT_EQ(text->second, "2");
    } else {
      EXPECT_TRUE(text->second == "1" || text->second == "2") << text->second;
    }
  }
  EXPECT_EQ(absent, fault == Fault::kNoExchange ? 1 : 0);
}

TEST_F(FileFaultsTest, AReplacedFolderIsThereAtEveryMoment) {
  ReplaceUnderKills(Fault::kNone);
}
TEST_F(FileFaultsTest, AFolderIsReplacedWhereNamesCannotBeExchanged) {
  ReplaceUnderKills(Fault::kNoExchange);
}
TEST_F(FileFaultsTest, IoErrors) { FailAtEvery(Fault::kIoError); }
TEST_F(FileFaultsTest, FullDisk) { FailAtEvery(Fault::kNoSpace); }
TEST_F(FileFaultsTest, FullDiskInsideAWrite) { FailAtEvery(Fault::kCutWrite); }
TEST_F(FileFaultsTest, WritesInParts) { FailAtEvery(Fault::kPartial); }
TEST_F(FileFaultsTest, PowerLoss) { LosePowerEverywhere(Lost::kUnsynced); }
TEST_F(FileFaultsTest, PowerLossWithNamesAheadOfBytes) {
  LosePowerEverywhere(Lost::kUnsyncedBytes);
}

}  // namespace
}  // namespace routecast
