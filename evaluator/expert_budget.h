// What a budget of fast memory holds. Torch-free. Thread rule: pure functions.
#pragma once

#include <cstdint>
#include <string>

#include "evaluator/expert_file.h"

namespace routecast {

// Slots that `budget_bytes` buys beside `staging_bytes` (compressed experts on their
// way). UsageError naming the least that works: two experts, one that runs and one that
// arrives.
int SlotsOfBudget(uint64_t budget_bytes, const ExpertFileSpec& spec,
                  uint64_t staging_bytes = 0);
// "this budget holds 12 of 48 experts, 216 MiB".
std::string BudgetText(int slots, int count, const ExpertFileSpec& spec);
// The same where the model's keys and values share the budget: slots when there are none,
// at most `count`, and beside the most bytes that they come to. UsageError naming the
// least that works.
struct SharedSlots {
  int most = 0, least = 0;
};
SharedSlots SlotsBeside(uint64_t budget_bytes, uint64_t most_key_value_bytes, int count,
                        const ExpertFileSpec& spec);
// "25%" of `whole_bytes`, or bytes with a unit.
uint64_t ParseBudget(const std::string& text, uint64_t whole_bytes);

}  // namespace routecast
