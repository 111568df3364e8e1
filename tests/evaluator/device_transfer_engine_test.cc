// Two hops to a device, with a fake one: what arrives, in which order, and what happens
// when it does not.
#include "evaluator/device_transfer_engine.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <map>

#include "common/random.h"
#include "evaluator/disk_transfer_engine.h"
#include "tests/evaluator/fake_device.h"

namespace routecast {
namespace {

constexpr uint64_t kChunk = 4096;
constexpr int kExperts = 8;
constexpr size_t kChunksAnExpert = 12;  // 2 x 64 x 96 fp32

class DeviceEngineTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / ("device_engine." + std::to_string(::getpid()));
    fs::create_directories(folder_);
    ExpertFileSpec spec;
    spec.geometry = {0, 1, kExperts, 1, 64};
    spec.d_ff = 96;
    WriteSyntheticExperts(folder_ / "experts", spec, {0}, true);
    file_ = std::make_shared<const ExpertFile>(folder_ / "experts");
    ASSERT_EQ(spec.blob_bytes(), kChunk * kChunksAnExpert);
  }
  void TearDown() override {
    engine_.reset();
    fs::remove_all(folder_);
  }

  void Open(int host_slots, int device_slots, bool managed = false,
            double deadline_seconds = 30, double disk_pace = 0) {
    DeviceEngineOptions options;
    options.deadline_seconds = deadline_seconds;
    options.chunk_bytes = kChunk;
    options.managed = managed;
    auto device = std::make_unique<FakeDevice>(log_, 1e9);
    DiskEngineOptions disk_options{2, kChunk, disk_pace};
    if (managed) {
      disk_options.memory = device->AllocateManaged(
          SlotArena::SlotBytes(host_slots, file_->spec().stride_bytes()));
    }
    auto disk = std::make_unique<DiskTransferEngine>(file_, host_slots, disk_options);
    std::byte* base = disk->arena().base();
    const uint64_t bytes = disk->arena().size_bytes();
    clock_ = device.get();
    engine_ = std::make_unique<DeviceTransferEngine>(file_->spec(), std::move(device),
                                                     std::move(disk), base, bytes,
                                                     host_slots, device_slots, options);
    engine_->SetDone([this](uint64_t id, TransferOutcome outcome, uint64_t bytes) {
      std::lock_guard lock(mutex_);
      EXPECT_EQ(done_.count(id), 0u) << "reported twice";
      done_[id] = {outcome, bytes};
      finished_.push_back(id);
      arrived_.notify_all();
    });
  }
  void Start(uint64_t id, int expert, int slot, bool demand) {
    engine_->Start({id, {0, expert}, slot, demand});
  }
  TransferOutcome Wait(uint64_t id) {
    std::unique_lock lock(mutex_);
    arrived_.wait(lock, [&] { return done_.count(id) > 0; });
    return done_[id].first;
  }
  void ExpectWhole(int expert, int slot) {
    EXPECT_NO_THROW(file_->Check({0, expert}, engine_->slot(slot))) << expert;
  }
  // Which slot each copy went to, in order, from copy `from` on.
  std::vector<int> SlotsOfCopies(size_t from) {
    std::lock_guard lock(log_->mutex);
    std::vector<int> slots;
    for (size_t i = from; i < log_->copies.size(); ++i) {
      slots.push_back(
          static_cast<int>(log_->copies[i].device_offset / file_->spec().stride_bytes()));
    }
    return slots;
  }

  fs::path folder_;
  std::shared_ptr<const ExpertFile> file_;
  std::shared_ptr<FakeDeviceLog> log_ = std::make_shared<FakeDeviceLog>();
  std::mutex mutex_;
  std::condition_variable arrived_;
  std::map<uint64_t, std::pair<TransferOutcome, uint64_t>> done_;
  std::vector<uint64_t> finished_;
  std::unique_ptr<DeviceTransferEngine> engine_;
  const FakeDevice* clock_ = nullptr;  // the engine's
};

TEST_F(DeviceEngineTest, EveryExpertArrivesWhole) {
  Open(3, kExperts);
  for (int e = 0; e < kExperts; ++e) Start(static_cast<uint64_t>(e), e, 7 - e, true);
  for (int e = 0; e < kExperts; ++e) {
    EXPECT_EQ(Wait(static_cast<uint64_t>(e)), TransferOutcome::kArrived);
    ExpectWhole(e, 7 - e);
  }
  EXPECT_LE(log_->most_under_way, 2u);
}

TEST_F(DeviceEngineTest, ManagedMemoryIsReadInPlaceAndHoldsNoMoreThanItsSlots) {
  Open(kExperts, 3, /*managed=*/true);
  ASSERT_TRUE(engine_->reads_in_place());
  for (int round = 0; round < 2; ++round) {
    for (int e = 0; e < kExperts; ++e) {
      const auto id = static_cast<uint64_t>(round * kExperts + e);
      Start(id, e, e % 3, true);
      EXPECT_EQ(Wait(id), TransferOutcome::kArrived);
      EXPECT_NO_THROW(file_->Check({0, e}, engine_->PlaceOf({0, e})));
    }
  }
  EXPECT_EQ(log_->resident_peak, 3 * kChunksAnExpert);
  EXPECT_EQ(engine_->disk_bytes(), kExperts * file_->spec().blob_bytes())
      << "each expert is read once";
  engine_->Discard(0);
  EXPECT_EQ(log_->resident.size(), 2 * kChunksAnExpert);
}

// Users of one engine that come one after the other number its slots as they like.
TEST_F(DeviceEngineTest, AManagedExpertThatChangesItsSlotStays) {
  Open(kExperts, 3, /*managed=*/true);
  Start(1, 5, 0, true);
  Wait(1);
  Start(2, 5, 1, true);
  Wait(2);
  Start(3, 6, 0, true);
  Wait(3);
  EXPECT_EQ(log_->resident.count(engine_->PlaceOf({0, 5})), 1u);
  EXPECT_EQ(log_->resident.size(), 2 * kChunksAnExpert);
}

TEST_F(DeviceEngineTest, ADemandOvertakesASpeculationBetweenTwoChunks) {
  Open(4, 4);
  for (uint64_t e : {0, 1}) {  // into host memory, so that no disk decides the order
    Start(e, static_cast<int>(e), static_cast<int>(e), true);
    Wait(e);
  }
  log_->Hold(true);
  Start(10, 0, 2, false);
  log_->WaitForCopies(2 * kChunksAnExpert + 2);
  Start(11, 1, 3, true);
  log_->Hold(false);
  Wait(10);
  std::vector<int> expected = {2, 2};
  expected.insert(expected.end(), kChunksAnExpert, 3);
  expected.insert(expected.end(), kChunksAnExpert - 2, 2);
  EXPECT_EQ(SlotsOfCopies(2 * kChunksAnExpert), expected);
  EXPECT_EQ(finished_, (std::vector<uint64_t>{0, 1, 11, 10}));
}

TEST_F(DeviceEngineTest, APromotedSpeculationIsADemand) {
  Open(4, 4);
  for (uint64_t e : {0, 1}) {
    Start(e, static_cast<int>(e), static_cast<int>(e), true);
    Wait(e);
  }
  log_->Hold(true);
  Start(10, 0, 2, false);
  log_->WaitForCopies(2 * kChunksAnExpert + 2);
  Start(11, 1, 3, false);
  engine_->Promote(11);
  log_->Hold(false);
  Wait(10);
  EXPECT_EQ(finished_, (std::vector<uint64_t>{0, 1, 11, 10}));
}

TEST_F(DeviceEngineTest, ACancelledSpeculationGivesTheLinkBack) {
  Open(2, 2);
  Start(0, 0, 0, true);
  Wait(0);
  log_->Hold(true);
  Start(1, 0, 1, false);
  log_->WaitForCopies(kChunksAnExpert + 2);
  engine_->Cancel(1);
  log_->Hold(false);
  EXPECT_EQ(Wait(1), TransferOutcome::kCancelled);
  EXPECT_EQ(done_[1].second, 2 * kChunk);
  EXPECT_EQ(SlotsOfCopies(0).size(), kChunksAnExpert + 2);
}

// A slot may be read by a layer that the device has not finished: each transfer waits for
// the model's work before its first byte.
TEST_F(DeviceEngineTest, EachTransferIsFencedBeforeItsFirstChunk) {
  Open(3, 3);
  for (uint64_t e : {0, 1, 2}) {
    Start(e, static_cast<int>(e), static_cast<int>(e), true);
    Wait(e);
  }
  EXPECT_EQ(log_->fences_before,
            (std::vector<size_t>{0, kChunksAnExpert, 2 * kChunksAnExpert}));
}

TEST_F(DeviceEngineTest, TwoTransfersOfOneExpertReadItOnce) {
  Open(4, 2);
  Start(0, 5, 0, true);
  Start(1, 5, 1, true);
  for (const int slot : {0, 1}) {
    EXPECT_EQ(Wait(static_cast<uint64_t>(slot)), TransferOutcome::kArrived);
    ExpectWhole(5, slot);
  }
  EXPECT_EQ(engine_->disk_bytes(), file_->spec().blob_bytes());
}

TEST_F(DeviceEngineTest, WhatTheHostHoldsNeedsNoDisk) {
  Open(2, 3);
  Start(0, 5, 0, true);
  EXPECT_EQ(Wait(0), TransferOutcome::kArrived);
  fs::resize_file(file_->path(), 4096);
  Start(1, 5, 1, true);
  EXPECT_EQ(Wait(1), TransferOutcome::kArrived);
  ExpectWhole(5, 1);
  Start(2, 6, 2, true);  // and this one is on disk only
  EXPECT_EQ(Wait(2), TransferOutcome::kFailed);
  EXPECT_NE(engine_->last_error(), "");
}

TEST_F(DeviceEngineTest, APacedLinkTakesItsTime) {
  Open(kExperts, kExperts);
  for (int e = 0; e < kExperts; ++e) Start(static_cast<uint64_t>(e), e, e, true);
  for (int e = 0; e < kExperts; ++e) Wait(static_cast<uint64_t>(e));  // now host memory
  constexpr double kSeconds = 1;  // virtual ones, for all experts
  const double before = clock_->Now();
  engine_->SetPace(kExperts * static_cast<double>(file_->spec().blob_bytes()) / kSeconds);
  for (int e = 0; e < kExperts; ++e) Start(100 + static_cast<uint64_t>(e), e, e, true);
  for (int e = 0; e < kExperts; ++e) Wait(100 + static_cast<uint64_t>(e));
  EXPECT_NEAR(clock_->Now() - before, kSeconds, 0.01 * kSeconds);
  EXPECT_NE(engine_->description().find("paced to"), std::string::npos);
  engine_->SetPace(0);
  Start(200, 0, 0, true);
  Wait(200);
  EXPECT_LT(clock_->Now() - before, 1.02 * kSeconds);
  EXPECT_EQ(engine_->disk_bytes(), kExperts * file_->spec().blob_bytes());
}

// Shorter than a late wake-up that is caught up: there is none to catch up.
TEST_F(DeviceEngineTest, AShortTransferOfAnIdlePacedLinkTakesItsTime) {
  Open(kExperts, kExperts);
  Start(0, 0, 0, true);
  EXPECT_EQ(Wait(0), TransferOutcome::kArrived);  // now host memory
  constexpr double kSeconds = 150e-6;
  engine_->SetPace(static_cast<double>(file_->spec().blob_bytes()) / kSeconds);
  for (uint64_t id = 1; id < 5; ++id) {
    const double before = clock_->Now();
    Start(id, 0, 0, true);
    EXPECT_EQ(Wait(id), TransferOutcome::kArrived);
    EXPECT_GE(clock_->Now() - before, kSeconds - 1e-9);
  }
}

// What waits for its pace is on the device already.
TEST_F(DeviceEngineTest, APaceSlowerThanTheDeadlineIsNoHangingDevice) {
  Open(kExperts, kExperts, /*managed=*/false, /*deadline_seconds=*/0.01);
  Start(0, 0, 0, true);
  EXPECT_EQ(Wait(0), TransferOutcome::kArrived);
  engine_->SetPace(static_cast<double>(kChunk) / 0.03);
  Start(1, 0, 0, true);
  EXPECT_EQ(Wait(1), TransferOutcome::kArrived) << engine_->last_error();
}

TEST_F(DeviceEngineTest, AnExpertThatCouldNotBeReadIsTriedAgain) {
  Open(2, 2);
  fs::copy_file(file_->path(), folder_ / "whole");
  fs::resize_file(file_->path(), 4096);
  Start(0, 3, 0, true);
  EXPECT_EQ(Wait(0), TransferOutcome::kFailed);
  fs::copy_file(folder_ / "whole", file_->path(), fs::copy_options::overwrite_existing);
  Start(1, 3, 0, true);
  EXPECT_EQ(Wait(1), TransferOutcome::kArrived);
  ExpectWhole(3, 0);
}

TEST_F(DeviceEngineTest, ACopyThatNeverCompletesIsNamed) {
  Open(2, 2);
  {
    std::lock_guard lock(log_->mutex);
    log_->hanging = true;
  }
  Start(0, 0, 0, true);
  EXPECT_EQ(Wait(0), TransferOutcome::kFailed);
  EXPECT_NE(engine_->last_error().find("does not complete"), std::string::npos)
      << engine_->last_error();
  Start(1, 1, 1, true);  // the device is lost: nothing waits for it again
  EXPECT_EQ(Wait(1), TransferOutcome::kFailed);
}

TEST_F(DeviceEngineTest, WhatTheDeviceRefusesIsNamed) {
  Open(2, 2);
  {
    std::lock_guard lock(log_->mutex);
    log_->failing = true;
  }
  Start(0, 0, 0, true);
  EXPECT_EQ(Wait(0), TransferOutcome::kFailed);
  EXPECT_NE(engine_->last_error().find("fake words"), std::string::npos);
}

// The disk brings what it has begun, for nobody.
TEST_F(DeviceEngineTest, AReadMayEndAfterTheDeviceIsLost) {
  Open(2, 2, false, 30, /*disk_pace=*/100e3);  // 0.5 s an expert
  Start(0, 0, 0, true);
  Wait(0);
  {
    std::lock_guard lock(log_->mutex);
    log_->failing = true;
  }
  Start(1, 1, 1, true);
  Start(2, 0, 1, true);  // from host memory: refused at once
  EXPECT_EQ(Wait(2), TransferOutcome::kFailed);
  engine_.reset();
  EXPECT_EQ(done_.count(1), 0u);
}

TEST_F(DeviceEngineTest, HostMemoryIsPinnedOnceAndWhole) {
  Open(3, 2);
  for (uint64_t e : {0, 1, 2, 3, 4}) {
    Start(e, static_cast<int>(e), static_cast<int>(e % 2), true);
    Wait(e);
  }
  EXPECT_EQ(log_->registered, (std::vector<uint64_t>{3 * file_->spec().stride_bytes()}));
  EXPECT_EQ(log_->unregistered, 0);
  engine_.reset();
  EXPECT_EQ(log_->unregistered, 1);
}

// Random orders from one thread, with promotions and cancellations: each is reported
// once, and what arrived is whole.
TEST_F(DeviceEngineTest, NoTransferIsLost) {
  constexpr int kSlots = 3;
  Open(2, kSlots);
  uint64_t id = 0;
  for (uint64_t round = 0; round < 60; ++round) {
    std::map<uint64_t, std::pair<int, int>> started;
    const int first = static_cast<int>(ToRange(Mix(7, round), kExperts));
    for (int s = 0; s < kSlots; ++s) {
      const int expert = (first + s) % kExperts;
      started[id] = {expert, s};
      Start(id, expert, s, ToUnit(Mix(8, id)) < 0.5);
      if (ToUnit(Mix(9, id)) < 0.3) engine_->Promote(id);
      if (ToUnit(Mix(10, id)) < 0.3) engine_->Cancel(id);
      ++id;
    }
    for (const auto& [order, place] : started) {
      if (Wait(order) == TransferOutcome::kArrived)
        ExpectWhole(place.first, place.second);
    }
  }
  EXPECT_EQ(done_.size(), id);
}

TEST(HostTierTest, TheLeastRecentlyUsedUnpinnedExpertLeaves) {
  HostTier tier(5, 2);
  for (int key : {0, 1}) {
    ASSERT_TRUE(tier.Read(key));
    EXPECT_EQ(tier.state(key), HostTier::State::kReading);
    tier.Arrive(key);
  }
  EXPECT_FALSE(tier.Read(2));  // both are pinned
  tier.Unpin(0);
  tier.Unpin(1);
  tier.Pin(0);  // used again
  tier.Unpin(0);
  const int slot = tier.slot(1);
  EXPECT_EQ(tier.Read(2), slot);
  EXPECT_EQ(tier.state(1), HostTier::State::kAbsent);
  EXPECT_EQ(tier.state(0), HostTier::State::kReady);
  tier.Drop(2);
  EXPECT_EQ(tier.Read(3), slot);
  EXPECT_EQ(tier.num_ready(), 1);
}

TEST(DeviceCopyTest, NoDeviceIsAnEnvironmentError) {
  // No machine has this one, and a build without CUDA has none.
  EXPECT_THROW(OpenCudaDevice(1000), EnvironmentError);
}

}  // namespace
}  // namespace routecast
