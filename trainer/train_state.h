// Checkpoints of a training run: FOLDER/step-00000200/{parameters,optimizer}.safetensors
// and state.json, sealed by a rename, so that a reader finds step n or an older one,
// never a part. The newest two are kept. Thread rule: rank 0 saves; every rank loads.
#pragma once

#include <optional>

#include "common/run_record.h"
#include "models/parameters.h"
#include "trainer/adamw.h"

namespace routecast {

struct TrainState {
  int64_t step = 0;    // steps done
  Json configuration;  // what must be equal to go on
  Json extra;          // the trainer's own counters (epoch, best score, ...)
};

void SaveTrainState(const fs::path& folder, const TrainState& state,
                    const Parameters& parameters, const AdamW& optimizer);
// The newest whole checkpoint's state, or nothing where there is none. Throws DataError
// where one is damaged.
std::optional<TrainState> FindTrainState(const fs::path& folder);
// Copies that checkpoint's tensors into parameters and optimizer.
void LoadTrainState(const fs::path& folder, int64_t step, const Parameters& parameters,
                    AdamW* optimizer);
// UsageError naming the first key that differs.
void CheckSameConfiguration(const Json& stored, const Json& current,
                            const fs::path& folder);

}  // namespace routecast
