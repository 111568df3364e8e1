// The programs' gpu tier on a fake device, whose memory the CPU computes from.
#include <algorithm>
#include <fstream>
#include <iterator>

#include "common/errors.h"
#include "common/machine.h"
#include "evaluator/evaluation_setup.h"
#include "models/device_choice.h"
#include "tests/evaluator/fake_device.h"
#include "tests/evaluator/gpu_tier_bodies.h"

namespace routecast {
namespace {

class GpuTierTest : public GpuTierBodies {
 protected:
  void Place(EvaluationOptions* options) override {
    options->tier = managed_ ? "managed,disk" : "gpu,host,disk";
    options->steps = steps_;
    options->open_device = [log = log_] {
      return std::make_unique<FakeDevice>(log, 1e9);
    };
  }
  StepMemory steps_ = StepMemory::kByDevice;
  std::shared_ptr<FakeDeviceLog> log_ = std::make_shared<FakeDeviceLog>();
};

TEST_F(GpuTierTest, AReplaysRowsPutOutTheSameBits) {
  EveryRowPutsOutTheSameBits(false);
  EXPECT_GT(log_->copies.size(), 0u);
}

TEST_F(GpuTierTest, AGenerationsRowsPutOutTheSameBits) {
  EveryRowPutsOutTheSameBits(true);
}

TEST_F(GpuTierTest, RowsOfSixteenBitsPutOutTheSameBits) {
  for (const char* dtype : {"bf16", "fp16"}) EveryRowPutsOutTheSameBits(false, dtype);
  EveryRowPutsOutTheSameBits(true, "bf16");
}

// As on a card: each step in parts, whose experts are looked up in tables of slots.
TEST_F(GpuTierTest, StepsInFixedMemoryPutOutTheSameBitsInEveryRow) {
  steps_ = StepMemory::kFixed;
  for (const bool generates : {false, true}) EveryRowPutsOutTheSameBits(generates);
  managed_ = true;
  EveryRowPutsOutTheSameBits(true);
  managed_ = false;
  GpuTierBodies::CompressedCopiesAreDecodedOnTheDevice();
  GpuTierBodies::AHostTierMayHoldAPartOnly();
}

TEST_F(GpuTierTest, TheOutputIsThatOfTheHostTier) {
  EvaluationOptions options = Options(true);
  const std::string device = Run(options)["rows"][0]["output_sha256"];
  options.tier.clear();
  options.open_device = nullptr;
  options.device = "cpu";
  EXPECT_EQ(Run(options)["rows"][0]["output_sha256"], device);
}

TEST_F(GpuTierTest, ManagedMemoryPutsOutTheSameBits) {
  const std::string copied = Run(Options(true))["rows"][0]["output_sha256"];
  managed_ = true;
  for (const bool generates : {false, true}) EveryRowPutsOutTheSameBits(generates);
  EXPECT_GT(log_->resident_peak, 0u);
  EXPECT_EQ(ReadJsonFile(Options(true).out / "results.json")["rows"][0]["output_sha256"],
            copied);
}

// Keys and values that grow take slots away: what lay in them leaves the device.
TEST_F(GpuTierTest, ManagedMemoryStaysWithinItsBudget) {
  managed_ = true;
  EvaluationOptions options = Options(true);
  options.tier = "managed:98304,disk";  // six experts of 16 KiB
  options.budget_given = false;
  options.kv_in_budget = true;
  const Json results = Run(options);
  for (const Json& row : results["rows"]) EXPECT_TRUE(row["lossless"].get<bool>());
  EXPECT_GT(log_->resident_peak, 0u);
  EXPECT_LE(log_->resident_peak * 4096, 98304u);
}

TEST_F(GpuTierTest, CopiesBesideManagedMemoryAreDecodedOnTheDevice) {
  managed_ = true;
  GpuTierBodies::CompressedCopiesAreDecodedOnTheDevice();
  EXPECT_GT(log_->decoded, 0);
}

TEST_F(GpuTierTest, AHostTierMayHoldAPartOnly) {
  GpuTierBodies::AHostTierMayHoldAPartOnly();
}

TEST_F(GpuTierTest, HostMemoryMayBePassedThroughOnly) {
  GpuTierBodies::HostMemoryMayBePassedThroughOnly();
}

TEST_F(GpuTierTest, CompressedCopiesAreDecodedOnTheDevice) {
  GpuTierBodies::CompressedCopiesAreDecodedOnTheDevice();
  EXPECT_GT(log_->decoded, 0);
}

TEST_F(GpuTierTest, WithoutRoomForAllThereIsNoResidentRow) {
  log_->free_bytes = 100'000;
  const EvaluationOptions options = Options(false);
  const Json results = Run(options);
  EXPECT_GE(results["rows"].size(), 6u);
  for (const Json& row : results["rows"]) EXPECT_NE(row["policy"], "resident");
  EXPECT_NE(ReadJsonFile(options.out / "run.json").dump().find("no row with all experts"),
            std::string::npos);
}

TEST_F(GpuTierTest, ADryRunNamesTheWay) {
  EvaluationOptions options = Options(false);
  options.tier = "gpu,host:64KiB,disk";
  options.dry_run = true;
  testing::internal::CaptureStdout();
  Evaluate(options, Json::object());
  const std::string plan = testing::internal::GetCapturedStdout();
  EXPECT_NE(plan.find("disk -> host memory (64.00 KiB) -> "), std::string::npos) << plan;
  options.tier = "gpu,disk";
  testing::internal::CaptureStdout();
  Evaluate(options, Json::object());
  EXPECT_NE(testing::internal::GetCapturedStdout().find("(a few in passing) -> "),
            std::string::npos);
}

TEST_F(GpuTierTest, WhatIsInUseOnTheDeviceIsReported) {
  log_->free_bytes = log_->memory_bytes - 5 * 1048576;
  const EvaluationOptions options = Options(false);
  EXPECT_EQ(Run(options)["device_peak_bytes"], 5 * 1048576);
  std::ifstream table(options.out / "table.txt");
  const std::string text{std::istreambuf_iterator<char>(table), {}};
  EXPECT_NE(text.find("device memory: 5.00 MiB in use at most"), std::string::npos);
}

// The published hierarchy: a share of the device, a share of host memory, what is
// compressed behind them.
TEST_F(GpuTierTest, SharesOfTheMemoriesAreSizes) {
  EvaluationOptions options = Options(false);
  options.budget_given = false;
  log_->memory_bytes = 20 * 16384;
  options.tier = "gpu:30%,host:50%,disk";
  const TierChain chain = PlacementOf(options).tiers.chain;
  EXPECT_EQ(chain.gpu_bytes, 6u * 16384);
  EXPECT_EQ(chain.host_bytes, MachineMemoryBytes() / 2);
  options.copies = "int8";
  const Json results = Run(options);
  uint64_t most = 0;
  for (const Json& row : results["rows"]) {
    if (row["policy"] != "resident")
      most = std::max(most, row["held_bytes_peak"].get<uint64_t>());
  }
  EXPECT_GT(most, 4u * 16384) << "what passes is small beside the slots";
  EXPECT_LE(most, 6u * 16384);
  EXPECT_GT(log_->decoded, 0);
}

// To open one takes a context of its own on a card, and seconds.
TEST_F(GpuTierTest, AShareOpensTheDeviceOnceToLookAtItsMemory) {
  EvaluationOptions options = Options(false);
  options.budget_given = false;
  options.dry_run = true;
  log_->memory_bytes = 20 * 16384;
  options.tier = "gpu:30%,host:50%,disk";
  int opened = 0;
  options.open_device = [&] {
    ++opened;
    return std::make_unique<FakeDevice>(log_, 1e9);
  };
  ValidateEvaluation(options);
  Evaluate(options, Json::object());
  EXPECT_EQ(opened, 1);
}

// A machine's own link is shown as it is, unless pacing is asked for.
TEST_F(GpuTierTest, OnlyAnEmulatedLinkIsPaced) {
  EvaluationOptions options = Options(false);
  EXPECT_FALSE(Run(options)["rows"][0]["emulated"].get<bool>());
  options.link = "emulated";
  EXPECT_TRUE(Run(options)["rows"][0]["emulated"].get<bool>());
}

TEST_F(GpuTierTest, ALostDeviceEndsTheRunByName) {
  log_->failing = true;
  try {
    Run(Options(false));
    FAIL();
  } catch (const EnvironmentError& e) {
    EXPECT_NE(std::string(e.what()).find("fake words"), std::string::npos) << e.what();
  }
}

TEST(PlacementTest, DeviceAndTierAgreeOrAreRefused) {
  EvaluationOptions options;
  options.device = "cpu";
  EXPECT_FALSE(PlacementOf(options).tiers.chain.gpu);
  options.tier = "gpu:1GiB,host,disk";
  EXPECT_THROW(PlacementOf(options), UsageError);
  options.tier = "managed:1GiB,disk";
  EXPECT_THROW(PlacementOf(options), UsageError);
  options.device = "auto";
  if (NumCudaDevices() == 0) {
    try {
      PlacementOf(options);
      FAIL();
    } catch (const EnvironmentError& e) {
      EXPECT_NE(std::string(e.what()).find("--tier=host:SIZE,disk"), std::string::npos)
          << e.what();
    }
  } else {
    EXPECT_TRUE(PlacementOf(options).tiers.chain.managed);
  }
  options.tier = "host:1GiB,disk";
  EXPECT_EQ(PlacementOf(options).device, at::Device(at::kCPU));
  options.device = "cuda";
  if (NumCudaDevices() == 0) {
    EXPECT_THROW(PlacementOf(options), EnvironmentError);
    options.tier = "gpu:1GiB,host,disk";
    EXPECT_THROW(PlacementOf(options), EnvironmentError);
    return;
  }
  EXPECT_THROW(PlacementOf(options), UsageError);
  options.tier.clear();
  EXPECT_TRUE(PlacementOf(options).tiers.chain.gpu);
}

TEST(HostSlotsTest, ASizeTooSmallNamesTheLeast) {
  const fs::path path =
      fs::temp_directory_path() / ("host_slots." + std::to_string(::getpid()));
  ExpertFileSpec spec;
  spec.geometry = {0, 1, 6, 1, 32};
  spec.d_ff = 64;
  WriteSyntheticExperts(path, spec, {0}, true);
  const ExpertFile file(path);
  fs::remove(path);
  EXPECT_EQ(HostSlots(ParseTiers("host:1GiB,disk"), file), 0);
  EXPECT_EQ(HostSlots(ParseTiers("gpu,host,disk"), file), 6);
  EXPECT_EQ(HostSlots(ParseTiers("gpu,host:49152,disk"), file), 3);
  EXPECT_EQ(HostSlots(ParseTiers("gpu,disk"), file), 6);  // it has no more than six
  try {
    HostSlots(ParseTiers("gpu,host:16384,disk"), file);
    FAIL();
  } catch (const UsageError& e) {
    EXPECT_NE(std::string(e.what()).find("host:32768 at least"), std::string::npos)
        << e.what();
  }
}

}  // namespace
}  // namespace routecast
