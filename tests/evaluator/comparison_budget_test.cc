// What a comparison's budget holds: experts, keys and values, steps in fixed memory; and
// which budget is too small.
#include <gtest/gtest.h>

#include "common/errors.h"
#include "tests/evaluator/comparison_fixture.h"

namespace routecast {
namespace {

TEST_F(ComparisonTest, KeysAndValuesShareTheBudget) {
  options_.link = "native";
  SignalPredictor predictor(traces_);
  const std::string alone = Compare({&predictor}).rows[0].output_sha256;
  const uint64_t slot = 4 * 4096;
  options_.kv_in_budget = true;
  options_.budget_bytes = 7 * slot;
  const ComparisonResult shared = Compare({&predictor});
  for (const RowResult& row : shared.rows) {
    EXPECT_EQ(row.output_sha256, alone) << row.policy;
    if (row.policy == "resident") continue;
    EXPECT_LE(row.memory_bytes_peak, options_.budget_bytes) << row.policy;
    EXPECT_GT(row.memory_bytes_peak, 6 * slot) << "room is used, too";
    EXPECT_LT(row.least_slots, 7) << row.policy;
    EXPECT_GE(row.least_slots, 2) << row.policy;
  }
  EXPECT_NE(shared.notes[0].find("share the budget: between 7 and"), std::string::npos)
      << shared.notes[0];
}

// Steps in fixed memory: the same in every row, and all of it is held all the time.
TEST_F(ComparisonTest, FixedMemoryIsTheSameInEveryRowAndCountsAsAWhole) {
  options_.link = "native";
  replay_.steps = StepMemory::kFixed;
  SignalPredictor predictor(traces_);
  for (const int batch : {1, 2}) {
    options_.batch = batch;
    options_.kv_in_budget = false;
    options_.budget_bytes = 9 * 4 * 4096;
    const ComparisonResult alone = Compare({&predictor});
    EXPECT_TRUE(alone.lossless);
    EXPECT_EQ(alone.rows.size(), 10u);
    options_.kv_in_budget = true;
    const ComparisonResult shared = Compare({&predictor});
    EXPECT_TRUE(shared.lossless);
    const uint64_t held =
        ReplayWorkload(traces_.geometry, SyntheticTraces(traces_, 4, 1), replay_)
            .MinKeyValueBytes();
    EXPECT_GT(held, 0u);
    const uint64_t fit = (options_.budget_bytes - held) / (4 * 4096);
    for (const RowResult& row : shared.rows) {
      EXPECT_EQ(row.output_sha256, alone.rows[0].output_sha256) << row.policy;
      if (row.policy == "resident") continue;
      EXPECT_EQ(row.least_slots, static_cast<int>(fit)) << row.policy;
      EXPECT_EQ(row.memory_bytes_peak, fit * 4 * 4096 + held);
    }
    const std::string slots = std::to_string(fit);
    EXPECT_NE(shared.notes[0].find("between " + slots + " and " + slots + " experts"),
              std::string::npos)
        << shared.notes[0];
  }
}

TEST_F(ComparisonTest, KeysAndValuesThatLeaveNoRoomAreRefused) {
  options_.kv_in_budget = true;
  options_.budget_bytes = 2 * 4 * 4096 + 1024;
  try {
    Compare({});
    FAIL();
  } catch (const UsageError& e) {
    EXPECT_NE(std::string(e.what()).find("keys and values come to"), std::string::npos)
        << e.what();
  }
}

TEST_F(ComparisonTest, TooSmallABudgetNamesTheLeastThatWorks) {
  options_.budget_bytes = 100;
  try {
    Compare({});
    FAIL();
  } catch (const UsageError& e) {
    EXPECT_NE(std::string(e.what()).find("--expert_budget=32768"), std::string::npos)
        << e.what();
  }
}

TEST_F(ComparisonTest, CopiesOnTheirWayNeedRoomAsWell) {
  options_.budget_bytes = 2 * 16384;  // two slots, and no room for what fills them
  copies_ = CopyKind::kInt8;
  try {
    Compare({});
    FAIL();
  } catch (const UsageError& e) {
    EXPECT_NE(std::string(e.what()).find("--expert_budget=65536"), std::string::npos)
        << e.what();
  }
}

}  // namespace
}  // namespace routecast
