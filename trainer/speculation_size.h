// What a training takes, before any of it is done. Thread rule: the training thread.
#pragma once

#include <string>

#include "trainer/speculation_trainer.h"

namespace routecast {

struct SpeculationSize {
  int64_t parameters = 0;
  int64_t steps = 0;  // at most
  int64_t steps_per_epoch = 0;
  uint64_t windows_per_epoch = 0;
  uint64_t bytes = 0;  // of memory a rank, before activations and traces
  // Of the train parts, once they are in memory; whether they are read there ahead.
  uint64_t record_bytes = 0;
  bool records_kept = true;
};
// Throws what TrainSpeculation throws for options that do not fit the traces.
SpeculationSize SizeOf(const SpeculationOptions& options, TraceDataset* dataset,
                       const std::vector<FurtherStore>& also = {});
// What --dry_run prints: model, parameters, windows, steps, memory.
std::string DescribeSpeculation(const SpeculationJob& job, TraceDataset* dataset,
                                int world);

}  // namespace routecast
