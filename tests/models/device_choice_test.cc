// Which rank gets which device, and what is said where there is none.
#include "models/device_choice.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "common/errors.h"

namespace routecast {
namespace {

using testing::HasSubstr;

template <class Error, class Call>
std::string TextOf(const Call& call) {
  try {
    call();
  } catch (const Error& e) {
    return e.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return "";
}

TEST(DeviceChoice, AutoIsTheCpuWhereThereIsNoCard) {
  EXPECT_EQ(ChooseDevice("auto", 1, 0).str(), "cpu");
  EXPECT_EQ(ChooseDevice("auto", 1, 2).str(), "cuda:1");
  EXPECT_EQ(ChooseDevice("cpu", 1, 2).str(), "cpu");
}

TEST(DeviceChoice, RanksOfAMachineTakeItsDevicesInTurn) {
  EXPECT_EQ(ChooseDevice("cuda", 0, 3).str(), "cuda:0");
  EXPECT_EQ(ChooseDevice("cuda", 2, 3).str(), "cuda:2");
  EXPECT_EQ(ChooseDevice("cuda", 4, 3).str(), "cuda:1");
  EXPECT_EQ(ChooseDevice("cuda:2", 0, 3).str(), "cuda:2");
}

TEST(DeviceChoice, AMissingDeviceIsNamedInThreeLines) {
  for (const char* name : {"cuda", "cuda:0", "cuda:12"}) {
    const std::string text = TextOf<EnvironmentError>([&] { ChooseDevice(name, 0, 0); });
    EXPECT_THAT(text, HasSubstr(std::string("--device=") + name));
    EXPECT_THAT(text, HasSubstr("0 CUDA devices were found"));
    EXPECT_THAT(text, HasSubstr("--device=cpu"));
    EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 2) << text;
  }
  const std::string text = TextOf<EnvironmentError>([] { ChooseDevice("cuda:3", 0, 2); });
  EXPECT_THAT(text, HasSubstr("cuda:0 to cuda:1"));
}

TEST(DeviceChoice, WhatIsNoNameIsAUsageError) {
  for (const char* name : {"gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:1000", ""}) {
    EXPECT_THROW(ChooseDevice(name, 0, 2), UsageError) << name;
  }
}

}  // namespace
}  // namespace routecast
