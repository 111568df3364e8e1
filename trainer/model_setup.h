// From options and traces to the model that is to be trained.
#pragma once

#include <vector>

#include "models/speculation_model.h"
#include "trainer/speculation_options.h"
#include "trainer/trace_dataset.h"

namespace routecast {

// UsageError where the kind needs what the store has not, an option what the kind has
// not, or the run to start from is of another kind or of other traces.
SpeculationConfig ConfigOf(const SpeculationOptions& options, TraceDataset* dataset);
// Of several stores, whose models share a trunk (joint_model.h): the first one's as
// ConfigOf says, the others' of its sizes, for their own geometries. UsageError also
// where the kind cannot share, or an option is of one store.
std::vector<SpeculationConfig> ConfigsOf(const SpeculationOptions& options,
                                         const std::vector<TraceDataset*>& stores);
// Copies the weights of the run options.start_from names, if any, into `model`, which
// ConfigOf described. Counts are the new store's.
void StartFromRun(const SpeculationOptions& options, SpeculationModel* model);
// What each member is trained by, in the order of the configuration's members; one where
// there are none. Learning rates are filled in.
std::vector<MemberOptions> TrainingOf(const SpeculationOptions& options,
                                      const SpeculationConfig& config);

inline WithHidden HiddenOf(const SpeculationConfig& config) {
  if (config.attention_heads > 0) return WithHidden::kAttended;
  return config.hidden_width > 0 ? WithHidden::kYes : WithHidden::kNo;
}

}  // namespace routecast
