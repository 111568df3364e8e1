// The Switch Transformer against values of transformers 5.23.0 that the repository keeps:
// no Python is needed.
#include <gtest/gtest.h>

#include "tests/models/switch_golden_support.h"

namespace routecast {
namespace {

fs::path Kept() {
  return fs::path(EnvOr("ROUTECAST_SOURCE_DIR", ".")) / "tests/golden/switch";
}

class SwitchReplay : public testing::TestWithParam<const char*> {
 protected:
  GoldenCase golden_{Kept() / GetParam()};
};

TEST_P(SwitchReplay, ForwardEqualsTheReference) { golden_.CompareForward(); }
TEST_P(SwitchReplay, LossesEqualTheReference) { golden_.CompareLosses(); }
TEST_P(SwitchReplay, GreedyTokensEqualTheReference) { golden_.CompareGreedy(); }
TEST_P(SwitchReplay, BeamsEqualTheReference) { golden_.CompareBeams(); }

INSTANTIATE_TEST_SUITE_P(Cases, SwitchReplay, testing::ValuesIn(kGoldenCases),
                         [](const auto& info) { return std::string(info.param); });

TEST(SamplingReplay, WarpersEqualTheReference) { CompareWarpers(Kept()); }

TEST(SwitchReplayCases, CapacityDropsWhereTheCaseSaysSo) {
  for (const char* name :
       {"capacity_3", "capacity_1", "capacity_0", "capacity_padding"}) {
    const GoldenCase golden(Kept() / name);
    EXPECT_TRUE(golden.Get("encoder_dropped_0").to(at::kBool).any().item<bool>()) << name;
    EXPECT_TRUE(golden.Get("decoder_dropped_0").to(at::kBool).any().item<bool>()) << name;
  }
}

}  // namespace
}  // namespace routecast
