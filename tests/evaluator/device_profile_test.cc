// What a machine's transfers say of its link, and what is no profile.
#include "evaluator/device_profile.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "common/errors.h"
#include "evaluator/disk_sweep.h"

namespace routecast {
namespace {

TEST(DeviceProfileTest, ALineThroughTransfersGivesRateAndFixedCost) {
  std::vector<TransferPoint> points;
  for (const uint64_t bytes :
       {uint64_t{64} << 10, uint64_t{1} << 20, uint64_t{64} << 20}) {
    TransferPoint p;
    p.bytes = bytes;
    p.seconds = 50e-6 + static_cast<double>(bytes) / 3e9;
    points.push_back(p);
  }
  double fixed = 0, rate = 0;
  FitLink(points, &fixed, &rate);
  EXPECT_NEAR(fixed, 50e-6, 1e-9);
  EXPECT_NEAR(rate, 3e9, 1e3);
}

TEST(DeviceProfileTest, TheDiskIsMeasuredAndTheScratchFileGoes) {
  DiskSweepOptions options;
  options.folder = fs::path(testing::TempDir()) / "transfer_test";
  options.file_bytes = options.largest = 4 << 20;
  options.seconds_a_point = 0.005;
  options.quiet = true;
  const DeviceProfile profile = MeasureDisk(options);
  EXPECT_GT(profile.link_bytes_per_second, 1e6);
  EXPECT_GT(profile.memory_bytes_per_second, 1e8);
  EXPECT_GE(profile.sweep.size(), 3u * 4 + 1);
  EXPECT_TRUE(std::any_of(profile.sweep.begin(), profile.sweep.end(),
                          [](const TransferPoint& p) { return p.both_ways; }));
  EXPECT_TRUE(fs::is_empty(options.folder));
  const DeviceProfile read = DeviceProfile::FromJson(profile.ToJson(), "test");
  EXPECT_DOUBLE_EQ(read.link_bytes_per_second, profile.link_bytes_per_second);
  EXPECT_FALSE(read.emulated);
}

// The page cache is eight times as fast as the disk, and says nothing about it.
TEST(DeviceProfileTest, TheLinkOfADiskIsWhatDirectReadsGet) {
  DeviceProfile profile;
  for (const bool direct : {true, false}) {
    for (const int threads : {1, 2}) {
      for (const uint64_t bytes : {uint64_t{1} << 20, uint64_t{16} << 20}) {
        TransferPoint p{bytes, threads, direct};
        p.seconds =
            1e-4 + static_cast<double>(bytes) / (1e9 * threads * (direct ? 1 : 8));
        profile.sweep.push_back(p);
      }
    }
  }
  ConcludeDisk(&profile);
  EXPECT_NEAR(profile.link_bytes_per_second, 2e9, 1e3);
  EXPECT_EQ(profile.bytes_at_90_percent, uint64_t{16} << 20);
  std::erase_if(profile.sweep, [](const TransferPoint& p) { return p.direct; });
  ConcludeDisk(&profile);  // a file system without direct reads
  EXPECT_NEAR(profile.link_bytes_per_second, 16e9, 1e4);
}

TEST(DeviceProfileTest, WhatIsNoProfileIsRefused) {
  EXPECT_THROW(FindProfile("rtx4090"), UsageError);
  EXPECT_TRUE(FindProfile("rtx3090").emulated);
  for (const char* text : {"[]", "{}", R"({"link_bytes_per_second": 0})",
                           R"({"link_bytes_per_second": "x", "link_fixed_seconds": 0,
            "memory_bytes_per_second": 1})",
                           R"({"link_bytes_per_second": -1, "link_fixed_seconds": 0,
            "memory_bytes_per_second": 1})"}) {
    EXPECT_THROW(DeviceProfile::FromJson(Json::parse(text), "test"), DataError) << text;
  }
}

}  // namespace
}  // namespace routecast
