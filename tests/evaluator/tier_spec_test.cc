#include "evaluator/tier_spec.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "common/errors.h"
#include "evaluator/expert_budget.h"

namespace routecast {
namespace {

constexpr uint64_t kGiB = uint64_t{1} << 30;

TEST(TierSpecTest, ReadsChains) {
  EXPECT_EQ(ParseTiers(""), (TierChain{}));
  EXPECT_EQ(ParseTiers("host,disk"), (TierChain{}));
  EXPECT_EQ(ParseTiers("host:2GiB,disk"), (TierChain{false, {}, 2 * kGiB}));
  EXPECT_EQ(ParseTiers("gpu:6GiB,host:16GiB,disk"),
            (TierChain{true, 6 * kGiB, 16 * kGiB}));
  EXPECT_EQ(ParseTiers("gpu,host,disk"), (TierChain{true, {}, {}}));
  EXPECT_EQ(ParseTiers("gpu:6GiB,disk"), (TierChain{true, 6 * kGiB, {}, false, true}));
  EXPECT_EQ(ParseTiers("gpu,disk"), (TierChain{true, {}, {}, false, true}));
  EXPECT_EQ(ParseTiers("managed:6GiB,disk"), (TierChain{true, 6 * kGiB, {}, true}));
  EXPECT_EQ(ParseTiers("managed,disk"), (TierChain{true, {}, {}, true}));
  EXPECT_STREQ(ParseTiers("managed,disk").fastest(), "managed");
  EXPECT_STREQ(ParseTiers("gpu,host,disk").fastest(), "gpu");
  EXPECT_STREQ(ParseTiers("host,disk").fastest(), "host");
}

TEST(TierSpecTest, ASizeMayBeAShareOfItsMemory) {
  const TierChain chain = ParseTiers("gpu:30%,host:50%,disk");
  EXPECT_EQ(chain.gpu_bytes, std::nullopt);
  EXPECT_DOUBLE_EQ(*chain.gpu_share, 0.3);
  const TierChain sized = WithSizes(chain, 20 * kGiB, 64 * kGiB);
  EXPECT_EQ(sized, (TierChain{true, 6 * kGiB, 32 * kGiB}));
  EXPECT_EQ(TierBudget(sized, 7, false), 6 * kGiB);
  const TierChain mixed = WithSizes(ParseTiers("gpu:1GiB,host:25%,disk"), 0, 64 * kGiB);
  EXPECT_EQ(mixed, (TierChain{true, kGiB, 16 * kGiB}));
  EXPECT_EQ(WithSizes(ParseTiers("managed:12.5%,disk"), 8 * kGiB, 0),
            (TierChain{true, kGiB, {}, true}));
  EXPECT_EQ(WithSizes(ParseTiers("host:50%,disk"), 0, 4 * kGiB),
            (TierChain{false, {}, 2 * kGiB}));
}

TEST(TierSpecTest, WhatIsNoChainIsUsageInThreeLines) {
  for (const char* wrong : {"disk",
                            "host",
                            "host:2GiB",
                            "gpu:6GiB",
                            "gpu:6GiB,gpu:2GiB,disk",
                            "host:1GiB,gpu:2GiB,disk",
                            "disk,host",
                            "host,host,disk",
                            "host:0,disk",
                            "host:0%,disk",
                            "host:101%,disk",
                            "host:-5%,disk",
                            "host:%,disk",
                            "host:nan%,disk",
                            "host:5x%,disk",
                            "gpu:30%,host:50%",
                            "host:many,disk",
                            "host:,disk",
                            "host:-1,disk",
                            "host,disk:5GiB",
                            "host,disk,",
                            ",host,disk",
                            "hosts,disk",
                            "gpu",
                            "GPU,host,disk",
                            "host disk",
                            "managed",
                            "managed:0,disk",
                            "managed,host,disk",
                            "gpu,managed,disk",
                            "disk,managed",
                            "host:99999999999999999999GiB,disk"}) {
    try {
      ParseTiers(wrong);
      FAIL() << wrong;
    } catch (const UsageError& e) {
      const std::string what = e.what();
      EXPECT_LE(std::count(what.begin(), what.end(), '\n'), 2) << what;
    }
  }
}

TEST(TierSpecTest, AnUnknownTierNamesTheNearest) {
  try {
    ParseTiers("gpus:1GiB,host,disk");
    FAIL();
  } catch (const UsageError& e) {
    EXPECT_NE(std::string(e.what()).find("gpu"), std::string::npos) << e.what();
  }
}

TEST(TierSpecTest, TheTiersSizeIsTheBudget) {
  const TierChain chain = ParseTiers("host:2GiB,disk");
  EXPECT_EQ(TierBudget(chain, 7, false), 2 * kGiB);
  EXPECT_EQ(TierBudget(chain, 2 * kGiB, true), 2 * kGiB);
  EXPECT_EQ(TierBudget(ParseTiers("host,disk"), 7, true), 7u);
  EXPECT_EQ(TierBudget(ParseTiers("gpu:1GiB,host,disk"), 7, false), kGiB);
  EXPECT_THROW(TierBudget(chain, kGiB, true), UsageError);
}

TEST(BudgetTest, SaysWhatItHolds) {
  ExpertFileSpec spec;
  spec.geometry = {1, 1, 4, 1, 32};
  spec.d_ff = 64;
  EXPECT_EQ(BudgetText(3, 8, spec), "this budget holds 3 of 8 experts, 48.00 KiB");
  EXPECT_EQ(BudgetText(30, 8, spec), "this budget holds 8 of 8 experts, 128.00 KiB");
}

TEST(BudgetTest, ReadsSharesAndSizes) {
  EXPECT_EQ(ParseBudget("25%", 1000), 250u);
  EXPECT_EQ(ParseBudget("2KiB", 1000), 2048u);
  EXPECT_THROW(ParseBudget("0%", 1000), UsageError);
  EXPECT_THROW(ParseBudget("101%", 1000), UsageError);
  EXPECT_THROW(ParseBudget("many", 1000), UsageError);
}

// 29 / 100 is a little less than .29 of a hundred experts.
TEST(BudgetTest, AShareOfAHundredExpertsHoldsAsMany) {
  for (uint64_t percent = 1; percent <= 100; ++percent) {
    for (const uint64_t bytes : {uint64_t{1}, uint64_t{100}, uint64_t{18} << 20}) {
      EXPECT_EQ(ParseBudget(std::to_string(percent) + "%", 100 * bytes), percent * bytes);
    }
  }
}

TEST(ExpertBudget, AShareWithoutItsSignIsNotTakenForBytes) {
  try {
    ParseBudget("0.25", 1000);
    FAIL() << "was taken for bytes";
  } catch (const UsageError& e) {
    EXPECT_NE(std::string(e.what()).find("write 25%"), std::string::npos) << e.what();
  }
}

}  // namespace
}  // namespace routecast
