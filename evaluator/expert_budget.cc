#include "evaluator/expert_budget.h"

#include <algorithm>

#include "common/errors.h"
#include "report/svg_chart.h"

namespace routecast {

int SlotsOfBudget(uint64_t budget_bytes, const ExpertFileSpec& spec,
                  uint64_t staging_bytes) {
  const uint64_t least = 2 * spec.stride_bytes() + staging_bytes;
  if (budget_bytes >= least)
    return static_cast<int>((budget_bytes - staging_bytes) / spec.stride_bytes());
  throw UsageError(ErrorText(
      "--expert_budget is smaller than one step needs",
      FormatBytes(budget_bytes) + " given; two experts (one runs, one arrives)" +
          (staging_bytes > 0 ? " and compressed ones on their way" : "") + " need " +
          FormatBytes(least),
      "use --expert_budget=" + std::to_string(least) +
          " or more, or as much in the first tier of --tier"));
}

std::string BudgetText(int slots, int count, const ExpertFileSpec& spec) {
  const int held = std::min(slots, count);
  return "this budget holds " + std::to_string(held) + " of " + std::to_string(count) +
         " experts, " + FormatBytes(static_cast<uint64_t>(held) * spec.stride_bytes());
}

SharedSlots SlotsBeside(uint64_t budget_bytes, uint64_t most_key_value_bytes, int count,
                        const ExpertFileSpec& spec) {
  const uint64_t slot = spec.stride_bytes(), least = most_key_value_bytes + 2 * slot;
  if (budget_bytes < least) {
    throw UsageError(ErrorText("--expert_budget is smaller than one step needs",
                               FormatBytes(budget_bytes) +
                                   " given; keys and values come to " +
                                   FormatBytes(most_key_value_bytes) +
                                   ", and two experts need " + FormatBytes(2 * slot),
                               "use --expert_budget=" + std::to_string(least) +
                                   " or more (with --tier: in its first tier), a smaller "
                                   "--batch or fewer --max_new_tokens"));
  }
  const auto slots = [&](uint64_t bytes) {
    return static_cast<int>(
        std::min<uint64_t>(bytes / slot, static_cast<uint64_t>(count)));
  };
  return {slots(budget_bytes), slots(budget_bytes - most_key_value_bytes)};
}

uint64_t ParseBudget(const std::string& text, uint64_t whole_bytes) {
  size_t used = 0;
  double percent = -1;
  try {
    percent = std::stod(text, &used);
  } catch (const std::exception&) {
  }
  if (used == text.size() && percent > 0 && percent < 1) {
    throw UsageError(ErrorText("--expert_budget=" + text + " is less than a byte",
                               "a share has a % behind it",
                               "write " + ShortNumber(100 * percent) + "%"));
  }
  if (text.empty() || text.back() != '%') return ParseBytes("--expert_budget", text);
  if (used + 1 != text.size() || !(percent > 0) || percent > 100) {
    throw UsageError(ErrorText("--expert_budget=" + text + " is not a share",
                               "more than 0% and at most 100%", "write 25% or 512MiB"));
  }
  return static_cast<uint64_t>(percent * static_cast<double>(whole_bytes) / 100);
}

}  // namespace routecast
