// The CUDA body of the seam, where there is a device: bytes arrive, pinned and pageable,
// and the two-hop engine fills real slots.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <condition_variable>
#include <mutex>
#include <vector>

#include "common/errors.h"
#include "common/random.h"
#include "evaluator/device_transfer_engine.h"
#include "evaluator/disk_transfer_engine.h"
#include "evaluator/expert_codec_cuda.h"

namespace routecast {
namespace {

class DeviceCopyGpuTest : public testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0)
      GTEST_SKIP() << "no CUDA device: " << cudaGetErrorString(error);
  }
  static std::vector<std::byte> Back(const std::byte* device, uint64_t bytes) {
    std::vector<std::byte> host(bytes);
    EXPECT_EQ(cudaMemcpy(host.data(), device, bytes, cudaMemcpyDeviceToHost),
              cudaSuccess);
    return host;
  }
};

TEST_F(DeviceCopyGpuTest, BytesArrivePinnedAndPageable) {
  constexpr uint64_t kBytes = 4 << 20;
  const auto device = OpenCudaDevice(0);
  std::byte* slab = device->Allocate(kBytes);
  SlotArena arena(1, kBytes);
  for (const bool pinned : {false, true}) {
    if (pinned) device->Register(arena.base(), arena.size_bytes());
    for (uint64_t i = 0; i < kBytes; ++i)
      arena.base()[i] = static_cast<std::byte>(i * (pinned ? 7 : 5));
    const auto ticket = device->CopyAsync(slab, arena.base(), kBytes, pinned ? 1 : 0);
    while (!device->IsOver(ticket)) device->Pause(1e-5);
    EXPECT_EQ(Back(slab, kBytes),
              std::vector<std::byte>(arena.base(), arena.base() + kBytes));
  }
  device->Unregister(arena.base());
}

TEST_F(DeviceCopyGpuTest, MoreThanTheDeviceHasIsNamed) {
  const auto device = OpenCudaDevice(0);
  EXPECT_THROW(device->Allocate(uint64_t{1} << 50), EnvironmentError);
  EXPECT_NE(device->Allocate(1 << 20), nullptr);  // and the device is still good
}

TEST_F(DeviceCopyGpuTest, WhatIsFreedIsThereAgain) {
  const auto device = OpenCudaDevice(0);
  const uint64_t before = device->FreeBytes();
  std::byte* slab = device->Allocate(uint64_t{256} << 20);
  EXPECT_LE(device->FreeBytes(), before - (uint64_t{200} << 20));
  device->Free(slab);
  EXPECT_GE(device->FreeBytes(), before - (uint64_t{50} << 20));
  EXPECT_GE(device->MemoryBytes(), before);
}

TEST_F(DeviceCopyGpuTest, TheTwoHopEngineFillsSlots) {
  const fs::path path =
      fs::temp_directory_path() / ("device_gpu." + std::to_string(::getpid()));
  ExpertFileSpec spec;
  spec.geometry = {0, 1, 6, 1, 768};
  spec.d_ff = 1024;
  WriteSyntheticExperts(path, spec, {0}, true);
  const auto file = std::make_shared<const ExpertFile>(path);
  auto disk = std::make_unique<DiskTransferEngine>(file, 3, DiskEngineOptions{});
  std::byte* base = disk->arena().base();
  const uint64_t bytes = disk->arena().size_bytes();
  DeviceTransferEngine engine(spec, OpenCudaDevice(0), std::move(disk), base, bytes, 3, 6,
                              {});
  std::mutex mutex;
  std::condition_variable arrived;
  int done = 0;
  engine.SetDone([&](uint64_t, TransferOutcome outcome, uint64_t) {
    std::lock_guard lock(mutex);
    EXPECT_EQ(outcome, TransferOutcome::kArrived);
    ++done;
    arrived.notify_all();
  });
  for (int e = 0; e < 6; ++e) engine.Start({static_cast<uint64_t>(e), {0, e}, e, e < 3});
  std::unique_lock lock(mutex);
  arrived.wait(lock, [&] { return done == 6; });
  for (int e = 0; e < 6; ++e) {
    EXPECT_NO_THROW(file->Check({0, e}, Back(engine.slot(e), spec.blob_bytes()).data()));
  }
  fs::remove(path);
}

TEST_F(DeviceCopyGpuTest, ManagedMemoryKeepsItsBytesOnTheWay) {
  constexpr uint64_t kBytes = 4 << 20;
  const auto device = OpenCudaDevice(0);
  std::byte* memory = nullptr;
  try {
    memory = device->AllocateManaged(kBytes);
  } catch (const EnvironmentError& e) {
    GTEST_SKIP() << e.what();
  }
  for (uint64_t i = 0; i < kBytes; ++i) memory[i] = static_cast<std::byte>(i * 7);
  const std::vector<std::byte> expected(memory, memory + kBytes);
  for (int round = 0; round < 2; ++round) {
    const auto ticket = device->PrefetchAsync(memory, kBytes, 0);
    while (!device->IsOver(ticket)) device->Pause(1e-5);
    EXPECT_EQ(Back(memory, kBytes), expected);
    device->DropPrefetched(memory, kBytes);
    EXPECT_EQ(Back(memory, kBytes), expected);
  }
}

// The kernels against the CPU's body, bit for bit.
TEST_F(DeviceCopyGpuTest, DecodingGivesTheBitsOfTheCpu) {
  constexpr uint64_t kRows = 37, kColumns = 300;
  std::vector<float> weights;
  for (uint64_t i = 0; i < kRows * kColumns; ++i)
    weights.push_back(static_cast<float>(ToNormal(Mix(3, i))));
  for (const CopyKind kind :
       {CopyKind::kInt8, CopyKind::kInt4, CopyKind::kSparse, CopyKind::kInt8Tensor}) {
    for (const ExpertDtype dtype :
         {ExpertDtype::kFloat32, ExpertDtype::kBfloat16, ExpertDtype::kFloat16}) {
      std::vector<std::byte> coded(CodedBytes(kind, kRows, kColumns));
      EncodeMatrix(kind, weights, kRows, coded);
      std::vector<std::byte> expected(weights.size() * DtypeBytes(dtype));
      DecodeMatrix(kind, coded.data(), kRows, kColumns, dtype, expected.data());
      const auto device = OpenCudaDevice(0);
      std::byte* from = device->Allocate(coded.size());
      std::byte* to = device->Allocate(expected.size());
      ASSERT_EQ(cudaMemcpy(from, coded.data(), coded.size(), cudaMemcpyHostToDevice),
                cudaSuccess);
      DecodeMatrixOnDevice(kind, from, kRows, kColumns, dtype, to, nullptr);
      EXPECT_EQ(Back(to, expected.size()), expected) << CopyName(kind);
    }
  }
}

}  // namespace
}  // namespace routecast
