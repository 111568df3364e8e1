// One test body for every device: CPU always, CUDA where there is a card. CTest runs the
// CPU's instances as `unit` and the others as `gpu` (routecast_device_test in
// tests/models/CMakeLists.txt).
#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <string>

namespace routecast {

class DeviceTest : public testing::TestWithParam<at::DeviceType> {
 protected:
  void SetUp() override {
    if (GetParam() == at::kCPU) return;
    if (!at::hasCUDA()) GTEST_SKIP() << "this build, or this machine, has no CUDA";
    if (at::detail::getCUDAHooks().deviceCount() == 0) GTEST_SKIP() << "no CUDA device";
  }
  at::Device device() const { return at::Device(GetParam()); }
  at::Tensor On(const at::Tensor& t) const { return t.defined() ? t.to(device()) : t; }
};

#define ROUTECAST_INSTANTIATE_DEVICES(Suite)                                \
  INSTANTIATE_TEST_SUITE_P(Cpu, Suite, testing::Values(at::kCPU),           \
                           [](const auto&) { return std::string("cpu"); }); \
  INSTANTIATE_TEST_SUITE_P(Cuda, Suite, testing::Values(at::kCUDA),         \
                           [](const auto&) { return std::string("cuda"); })

}  // namespace routecast
