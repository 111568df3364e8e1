#include "trainer/speculation_options.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "common/errors.h"

namespace routecast {
namespace {

constexpr double kLastShare = 0.02;

void RequirePositive(const char* flag, double value) {
  if (value > 0 && std::isfinite(value)) return;
  throw UsageError(ErrorText(std::string(flag) + " must be above 0",
                             "it is " + std::to_string(value), ""));
}
void RequireNotNegative(const char* flag, double value) {
  if (value >= 0 && std::isfinite(value)) return;
  throw UsageError(ErrorText(std::string(flag) + " must be 0 or more",
                             "it is " + std::to_string(value), ""));
}

}  // namespace

Json SpeculationOptions::ToJson() const {
  return {{"kind", kind},
          {"epochs", epochs},
          {"steps", steps},
          {"global_batch", global_batch},
          {"micro_batch", micro_batch},
          {"learning_rate", learning_rate},
          {"warmup_steps", warmup_steps},
          {"weight_decay", weight_decay},
          {"clip_norm", clip_norm},
          {"confidence_weight", confidence_weight},
          {"next_token_weight", next_token_weight},
          {"patience", patience},
          {"validate_every", validate_every},
          {"log_every", log_every},
          {"validation_sequences", validation_sequences},
          {"test_sequences", test_sequences},
          {"seed", seed}};
}

void SpeculationOptions::Validate() const {
  if (steps == 0) RequirePositive("--epochs", epochs);
  RequireNotNegative("--steps", static_cast<double>(steps));
  RequirePositive("--micro_batch", micro_batch);
  RequirePositive("--global_batch", global_batch);
  if (global_batch % micro_batch != 0) {
    throw UsageError(ErrorText(
        "--global_batch must be a multiple of --micro_batch",
        std::to_string(global_batch) + " and " + std::to_string(micro_batch), ""));
  }
  RequireNotNegative("--learning_rate", learning_rate);
  RequireNotNegative("--warmup_steps", warmup_steps);
  RequireNotNegative("--weight_decay", weight_decay);
  RequirePositive("--clip_norm", clip_norm);
  RequireNotNegative("--patience", patience);
  RequireNotNegative("--validate_every", validate_every);
  RequirePositive("--log_every", log_every);
}

double SpeculationLearningRate(const SpeculationOptions& options, int64_t step,
                               int64_t steps) {
  const auto warmup = std::min<int64_t>(options.warmup_steps, steps / 10 + 1);
  if (step < warmup) {
    return options.learning_rate * static_cast<double>(step + 1) /
           static_cast<double>(warmup);
  }
  const double done = static_cast<double>(step - warmup) /
                      static_cast<double>(std::max<int64_t>(1, steps - warmup));
  const double cosine = 0.5 * (1 + std::cos(std::numbers::pi * std::min(1.0, done)));
  return options.learning_rate * (kLastShare + (1 - kLastShare) * cosine);
}

}  // namespace routecast
