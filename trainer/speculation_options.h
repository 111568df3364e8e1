// What training a speculation model takes.
#pragma once

#include <cstdint>
#include <string>

#include "common/run_record.h"

namespace routecast {

struct SpeculationOptions {
  std::string kind = "hidden";
  int epochs = 8;            // at most; early stopping may end before
  int64_t steps = 0;         // > 0: exactly this many at most, instead of epochs
  int global_batch = 64;     // windows a step over all ranks
  int micro_batch = 16;      // windows a forward pass: the compute unit at any world size
  double learning_rate = 0;  // peak; 0 = the kind's
  int warmup_steps = 100;    // linear, at most a tenth of the run; then cosine
  double weight_decay = 0.01;
  double clip_norm = 1.0;
  double confidence_weight = 0.1;  // of the confidence's loss
  double next_token_weight = 1;    // of the next token's, where a kind guesses it
  int patience = 5;                // validations without a better loss; 0 = never stop
  int validate_every = 0;          // steps; 0 = an epoch, at least 8 times a run
  int log_every = 20;              // steps
  uint64_t validation_sequences = 256;  // a (stack, source layer); 0 = all
  uint64_t test_sequences = 0;          // a (stack, source layer); 0 = all
  uint64_t seed = 1;

  Json ToJson() const;
  // Throws UsageError naming the flag.
  void Validate() const;
};

// Learning rate of `step` (from 0) of `steps`: linear warm-up, then a cosine to a
// fiftieth.
double SpeculationLearningRate(const SpeculationOptions& options, int64_t step,
                               int64_t steps);

}  // namespace routecast
