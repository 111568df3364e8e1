// What a training says while it runs: metrics.jsonl and TensorBoard's event files of its
// folder, on rank 0; on the others nothing. Thread rule: the training thread.
#pragma once

#include <cstdint>
#include <optional>

#include "common/files.h"
#include "common/run_record.h"
#include "trainer/speculation_evaluation.h"
#include "trainer/tensorboard_events.h"

namespace routecast {

// Where a run is: what every line begins with.
struct TrainingPlace {
  int64_t step = 0;
  double epoch = 0;
  int64_t samples = 0;  // windows so far, all ranks
};
// Of the steps since the last line.
struct StepFigures {
  double loss = 0;
  double learning_rate = 0, grad_norm = 0;
  double samples_per_second = 0;
  double waiting_for_data = 0;  // shares of the steps' time: for batches that were not
  double making_batches = 0;    // ready; that the loader's thread worked, meanwhile
};

class TrainingLog {
 public:
  TrainingLog() = default;  // writes nothing
  // Goes on after `step`: lines of later steps are dropped. 0 = a new file.
  TrainingLog(const fs::path& out, int64_t step);
  void Write(const TrainingPlace& place, const StepFigures& figures);
  void Write(const TrainingPlace& place, const ValidationScores& scores);

 private:
  std::optional<JsonLines> metrics_;
  std::optional<TensorboardEvents> events_;
};

}  // namespace routecast
