// The programs' gpu tier on the first CUDA device, where there is one.
#include "models/device_choice.h"
#include "tests/evaluator/gpu_tier_bodies.h"

namespace routecast {
namespace {

class GpuTierGpuTest : public GpuTierBodies {
 protected:
  void SetUp() override {
    if (NumCudaDevices() == 0) GTEST_SKIP() << "no CUDA device was found";
  }
  void Place(EvaluationOptions* options) override {
    options->device = "cuda:0";
    if (managed_) options->tier = "managed,disk";
  }
};

TEST_F(GpuTierGpuTest, AReplaysRowsPutOutTheSameBits) {
  EveryRowPutsOutTheSameBits(false);
}
TEST_F(GpuTierGpuTest, AGenerationsRowsPutOutTheSameBits) {
  EveryRowPutsOutTheSameBits(true);
}
TEST_F(GpuTierGpuTest, RowsOfSixteenBitsPutOutTheSameBits) {
  for (const char* dtype : {"bf16", "fp16"}) {
    EveryRowPutsOutTheSameBits(false, dtype);
    EveryRowPutsOutTheSameBits(true, dtype);
  }
}
TEST_F(GpuTierGpuTest, ManagedMemoryPutsOutTheSameBits) {
  managed_ = true;
  for (const bool generates : {false, true}) EveryRowPutsOutTheSameBits(generates);
}
TEST_F(GpuTierGpuTest, AHostTierMayHoldAPartOnly) {
  GpuTierBodies::AHostTierMayHoldAPartOnly();
}
TEST_F(GpuTierGpuTest, HostMemoryMayBePassedThroughOnly) {
  GpuTierBodies::HostMemoryMayBePassedThroughOnly();
}
TEST_F(GpuTierGpuTest, CompressedCopiesAreDecodedOnTheDevice) {
  GpuTierBodies::CompressedCopiesAreDecodedOnTheDevice();
}

}  // namespace
}  // namespace routecast
