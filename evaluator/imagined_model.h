// The model that a simulation imagines around recorded routing: how large an expert is,
// and how long a step works besides. Each figure is given, or follows from a model's
// sizes at the rate of the profile's memory, and says which. Plain values.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/run_record.h"
#include "evaluator/device_profile.h"
#include "evaluator/paced_compute.h"

namespace routecast {

struct ImaginedSizes {
  // What is given; seconds of a decoder step of one sequence.
  std::optional<uint64_t> expert_bytes;
  std::optional<double> layer_seconds;   // a MoE layer without its experts
  std::optional<double> expert_seconds;  // computing one
  std::optional<double> head_seconds;    // behind the last layer: vocabulary head
  // What the others follow from, and whose sizes that are; null: those of a Switch model
  // as PolicySimulationOptions has it.
  std::optional<LayerWork> work;
  std::string work_from = "switch-base's sizes, fp32";
};

struct ImaginedModel {
  struct Figure {
    double value = 0;  // bytes, seconds
    std::string from;  // in words
  };
  Figure expert_bytes, layer, expert, head;
  Json ToJson() const;       // of each `value`, in bytes or microseconds, and `from`
  std::string From() const;  // "expert_bytes: --expert_bytes; layer_us: ..."
  std::string Text() const;  // a line for people
};

// A figure is given; else computing an expert takes what reading it once takes, and all
// follow from `sizes.work`, or else from `work`. REQUIRES values above 0 where given.
ImaginedModel Imagine(const ImaginedSizes& sizes, const LayerWork& work,
                      const DeviceProfile& profile);

// Shares of `experts` of such a model, from --expert_budget's shares and sizes; 1 where
// all fit. UsageError where one is neither, or two hold as many.
std::vector<double> SharesOfBudgets(const std::vector<std::string>& budgets, int experts,
                                    const ImaginedModel& model);

}  // namespace routecast
