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

// What a run counts from one logged step to the next. Thread rule: one thread.
class StepMeter {
 public:
  struct Step {
    double loss = 0;                 // mean over the labels of all ranks
    double windows = 0;              // of all ranks
    double seconds = 0, waited = 0;  // of this process; of them, for batches
  };
  void Add(const Step& step);
  // Of the steps since the last time. `running`: seconds of this process' training so
  // far; `loading`: seconds that its loader has worked.
  StepFigures Take(double learning_rate, double grad_norm, double running,
                   double loading);
  int64_t samples() const { return samples_; }  // of the run
  // What a checkpoint holds of it.
  Json ToJson() const;
  void Load(const Json& json);

 private:
  double loss_sum_ = 0;
  int64_t loss_steps_ = 0, samples_ = 0;
  double process_samples_ = 0, data_seconds_ = 0, step_seconds_ = 0, loading_ = 0;
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
