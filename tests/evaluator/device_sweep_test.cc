#include "evaluator/device_sweep.h"

#include <gtest/gtest.h>

#include "evaluator/expert_transfers.h"
#include "evaluator/kernel_sweep.h"
#include "tests/evaluator/fake_device.h"

namespace routecast {
namespace {

DeviceSweepOptions Small() {
  DeviceSweepOptions options;
  options.largest = 4 << 20;
  options.seconds_a_point = 0;
  options.quiet = true;
  return options;
}

// The fake's link is 20 GB/s behind 5 us, half of that for pageable memory.
TEST(DeviceSweepTest, TheLinkIsWhatTheDeviceDoes) {
  auto log = std::make_shared<FakeDeviceLog>();
  FakeDevice device(log, 20e9, 5e-6);
  DeviceProfile profile;
  MeasureDevice(&device, Small(), &profile);
  EXPECT_NEAR(profile.link_bytes_per_second, 20e9, 0.2e9);
  EXPECT_NEAR(profile.link_fixed_seconds, 5e-6, 0.5e-6);
  EXPECT_EQ(profile.name, "fake device");
  EXPECT_NEAR(profile.memory_bytes_per_second, 400e9, 20e9);
  EXPECT_EQ(profile.memory_bytes, log->free_bytes) << "what bounds an emulated row";
  EXPECT_GE(profile.bytes_at_90_percent, 1u << 20);
  int pinned = 0, pageable = 0, beside = 0, both_ways = 0;
  for (const TransferPoint& p : profile.sweep) {
    EXPECT_TRUE(p.to_device);
    EXPECT_GE(p.repeats, 5);
    (p.both_ways      ? both_ways
     : p.with_compute ? beside
     : p.pinned       ? pinned
                      : pageable) += 1;
    if (p.both_ways) {
      EXPECT_EQ(p.bytes, 4u << 20);
      EXPECT_NEAR(p.bytes_per_second(), 10e9, 0.3e9);  // behind as much the other way
    } else if (p.bytes == 4 << 20 && p.threads == 1 && !p.with_compute) {
      EXPECT_NEAR(p.bytes_per_second(), p.pinned ? 20e9 : 10e9, 0.5e9);
    }
  }
  EXPECT_EQ(pinned, 8);  // four sizes, one and two streams
  EXPECT_EQ(pageable, 8);
  EXPECT_EQ(beside, 1);
  EXPECT_EQ(both_ways, 1);
  // Ten of them are as long as the transfer, which they go on beside, but for the last.
  EXPECT_GE(log->copies_within, 5 * 10);
  EXPECT_TRUE(log->slabs.empty()) << "what was measured with is given back";
  EXPECT_EQ(log->copied_back % (4u << 20), 0u);
  EXPECT_GE(log->copied_back, 5u * (4u << 20));
  EXPECT_EQ(log->registered.size(), 1u);
  EXPECT_EQ(log->unregistered, 1);
}

ExpertTransferOptions FewExperts() {
  ExpertTransferOptions options;
  options.shapes = {{64, 128}, {128, 256}};
  options.experts = {1, 3};
  options.trials = 7;
  options.quiet = true;
  return options;
}

// One copy an expert: each pays what a copy costs.
TEST(ExpertTransfersTest, ExpertsTakeACopyEach) {
  auto log = std::make_shared<FakeDeviceLog>();
  log->allocation_seconds = 1e-3;
  FakeDevice device(log, 20e9, 5e-6);
  const auto rows = MeasureExpertTransfers(&device, FewExperts());
  ASSERT_EQ(rows.size(), 6u * 4) << "three copies and three allocations";
  int pinned = 0;
  for (const ExpertTransfer& row : rows) {
    EXPECT_EQ(row.bytes,
              4u * static_cast<uint64_t>(row.d_model * row.d_ff * row.experts));
    EXPECT_EQ(row.trials, 7) << row.what;
    const double bytes = static_cast<double>(row.bytes), copies = row.experts;
    if (row.what == "to the device, pinned") {
      ++pinned;
      EXPECT_NEAR(row.mean, copies * 5e-6 + bytes / 20e9, 1e-9);
      EXPECT_NEAR(row.deviation, 0, 1e-12);
    } else if (row.what == "to the device, pageable") {
      EXPECT_NEAR(row.mean, copies * 5e-6 + bytes / 10e9, 1e-9);
    } else if (row.what == "within the device") {
      EXPECT_NEAR(row.mean, bytes / 200e9, 1e-9);
    } else if (row.what == "allocation, device") {
      EXPECT_NEAR(row.mean, 1e-3, 1e-9);
    }
  }
  EXPECT_EQ(pinned, 4);
  EXPECT_EQ(log->registered.size(), static_cast<size_t>(log->unregistered));
  EXPECT_TRUE(log->slabs.empty()) << "what was measured with is given back";
}

TEST(ExpertTransfersTest, WithoutADeviceHostMemoryIsMeasured) {
  ExpertTransferOptions options = FewExperts();
  options.most_bytes = 3 * 4 * 64 * 128;  // of the larger shape not even one
  const auto rows = MeasureExpertTransfers(nullptr, options);
  ASSERT_EQ(rows.size(), 4u);
  for (const ExpertTransfer& row : rows) {
    EXPECT_EQ(row.d_model, 64);
    EXPECT_GT(row.mean, 0);
    EXPECT_GE(row.trials, 3);
  }
  EXPECT_EQ(rows.front().what, "within host memory");
  EXPECT_EQ(rows.back().what, "allocation, pageable");
}

TEST(ExpertTransfersTest, ACopyThatNeverCompletesIsNamed) {
  auto log = std::make_shared<FakeDeviceLog>();
  log->hanging = true;
  FakeDevice device(log, 20e9);
  EXPECT_THROW(MeasureExpertTransfers(&device, FewExperts()), EnvironmentError);
}

TEST(DeviceSweepTest, TheProfileKeepsItsPointsInJson) {
  auto log = std::make_shared<FakeDeviceLog>();
  FakeDevice device(log, 20e9, 5e-6);
  DeviceProfile profile;
  TransferPoint disk;
  disk.bytes = 1 << 20;
  disk.seconds = 1e-3;
  profile.sweep.push_back(disk);
  MeasureDevice(&device, Small(), &profile);
  profile.experts = MeasureExpertTransfers(&device, FewExperts());
  const Json json = profile.ToJson();
  EXPECT_EQ(json["experts"].size(), profile.experts.size());
  EXPECT_EQ(json["experts"][0]["what"], "to the device, pageable");
  EXPECT_FALSE(json["sweep"][0]["to_device"].get<bool>());
  EXPECT_TRUE(json["sweep"][1]["to_device"].get<bool>());
  const DeviceProfile read = DeviceProfile::FromJson(json, "test");
  EXPECT_DOUBLE_EQ(read.link_bytes_per_second, profile.link_bytes_per_second);
  EXPECT_EQ(read.memory_bytes, profile.memory_bytes);
  EXPECT_NE(ProfileTable(profile).find("16.00 GiB free"), std::string::npos);
  EXPECT_NE(ProfileTable(profile).find("pinned"), std::string::npos);
  EXPECT_NE(ProfileTable(profile).find("allocation, device"), std::string::npos);
}

TEST(KernelSweepTest, ProductsTakeTheirTime) {
  const double rate = MeasureProducts(at::kCPU, at::kFloat, 64, 0.01);
  EXPECT_GT(rate, 1e6);
  EXPECT_LT(rate, 1e14) << "no CPU does that: the time was not taken";
}

TEST(DeviceSweepTest, ACopyThatNeverCompletesIsNamed) {
  auto log = std::make_shared<FakeDeviceLog>();
  log->hanging = true;
  FakeDevice device(log, 20e9);
  DeviceProfile profile;
  EXPECT_THROW(MeasureDevice(&device, Small(), &profile), EnvironmentError);
}

}  // namespace
}  // namespace routecast
