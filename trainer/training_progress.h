// How far a training has come: what its checkpoints hold, and what must be equal for a
// process to go on with them. Thread rule: the training thread.
#pragma once

#include <string>
#include <vector>

#include "models/speculation_config.h"
#include "trainer/best_parameters.h"
#include "trainer/speculation_options.h"
#include "trainer/trace_dataset.h"
#include "trainer/train_state.h"
#include "trainer/training_log.h"

namespace routecast {

// Options, models and traces, by store.
Json RunConfiguration(const SpeculationOptions& options,
                      const std::vector<SpeculationConfig>& configs,
                      const std::vector<TraceDataset*>& stores);

struct TrainingProgress {
  int64_t step = 0;  // steps done
  BestParameters best;
  StepMeter meter;
  double seconds = 0;           // of training, of the processes before this one
  bool validation_due = false;  // a stop came before the step's validation had ended
};

// Beside the progress line: the loss, the best validation's score where there was one,
// and chance's loss.
std::string NoteOf(double loss, const BestParameters& best, int num_experts);

// Into the folder of a run's checkpoints, which keeps the newest `keep` (>= 1) and the
// best parameters that each of them names. `seconds`: of training so far, all processes.
// Rank 0.
void SaveProgress(const fs::path& folder, const TrainingProgress& progress,
                  double seconds, const Json& configuration, const Parameters& trained,
                  const AdamW& optimizer, int keep);
// The newest checkpoint's, or false where there is none; every rank. Throws UsageError
// where it is of another configuration (`out` is what the text names) and DataError where
// it is damaged.
bool LoadProgress(const fs::path& folder, const fs::path& out, const Json& configuration,
                  const Parameters& trained, AdamW* optimizer,
                  TrainingProgress* progress);

}  // namespace routecast
