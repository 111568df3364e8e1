// Event files: the framing by hand, and what TensorBoard's own reader makes of them.
#include "trainer/tensorboard_events.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <sstream>

#include "tests/support/reference.h"

namespace routecast {
namespace {

fs::path Folder(const std::string& name) {
  const fs::path folder = fs::path(testing::TempDir()) / ("events_" + name);
  fs::remove_all(folder);
  return folder;
}

// RFC 3720, B.4.
TEST(TensorboardEventsTest, ChecksumsAreCastagnoli) {
  EXPECT_EQ(Crc32c(std::string(32, '\0')), 0x8a9136aau);
  EXPECT_EQ(Crc32c(std::string(32, '\xff')), 0x62a8ab43u);
  EXPECT_EQ(Crc32c("123456789"), 0xe3069283u);
}

TEST(TensorboardEventsTest, TheUpstreamReaderFindsTheScalars) {
  const fs::path folder = Folder("whole");
  {
    TensorboardEvents events(folder, 0);
    events.Write(20, {{"train/loss", 2.5}, {"train/learning_rate", 1e-3}});
    events.Write(40, {{"train/loss", -0.125}});
    events.Write(int64_t{1} << 40, {{"valid/top1", 0.75}});
  }
  const fs::path out = Folder("out.txt");
  ASSERT_EQ(RunReference("read_events.py", folder.string() + " > " + out.string()), 0);
  EXPECT_EQ(ReadFile(out),
            "train/learning_rate 20 0.0010000000474974513\n"
            "train/loss 20 2.5\n"
            "train/loss 40 -0.125\n"
            "valid/top1 1099511627776 0.75\n");
}

// A run that stopped at step 60 without a checkpoint since 40 goes on from 40.
TEST(TensorboardEventsTest, AResumedRunReplacesWhatItDoesAgain) {
  const fs::path folder = Folder("resumed");
  {
    TensorboardEvents events(folder, 0);
    for (const int step : {20, 40, 60}) events.Write(step, {{"loss", step * 1.0}});
  }
  {
    TensorboardEvents events(folder, 41);
    for (const int step : {60, 80}) events.Write(step, {{"loss", step * 2.0}});
  }
  const fs::path out = Folder("resumed.txt");
  ASSERT_EQ(RunReference("read_events.py", folder.string() + " > " + out.string()), 0);
  EXPECT_EQ(ReadFile(out), "loss 20 20.0\nloss 40 40.0\nloss 60 120.0\nloss 80 160.0\n");
}

}  // namespace
}  // namespace routecast
