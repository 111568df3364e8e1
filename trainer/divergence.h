// What is said where a loss or gradient is no number any more.
#pragma once

#include <string>
#include <vector>

#include "common/errors.h"
#include "models/speculation_model.h"
#include "trainer/speculation_batch.h"

namespace routecast {

// A loss or gradient is not finite: more often than not by the options.
struct DivergedError : UsageError {
  using UsageError::UsageError;
};

inline constexpr char kDivergedAdvice[] =
    "start anew with a lower --learning_rate or --clip_norm; the last checkpoint is "
    "whole";

// The first tensor that is not finite, in the order in which one makes the next one so:
// parameters and constants, what the window and the labels' weights hold, outputs by
// member. Empty where all are finite. Waits for the device.
std::string FirstNotFinite(const SpeculationModel& model, const SpeculationBatch& batch,
                           const std::vector<SpeculationOutput>& outputs);
// Throws DivergedError. `where` says which step, or what else asked.
[[noreturn]] void ThrowDiverged(const std::string& where, const SpeculationModel& model,
                                const SpeculationBatch& batch,
                                const std::vector<SpeculationOutput>& outputs);

}  // namespace routecast
