// Checkpoints of a training run: FOLDER/step-00000200/{parameters,optimizer}.safetensors
// and state.json, sealed by a rename, so that a reader finds step n or an older one,
// never a part. The newest few are kept. state.json holds its own checksum and those of
// all files that the state needs. Thread rule: rank 0 saves; every rank loads.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "common/run_record.h"
#include "models/parameters.h"
#include "trainer/adamw.h"

namespace routecast {

inline constexpr int kKeptStates = 2;  // checkpoints that a run keeps

struct TrainState {
  int64_t step = 0;    // steps done
  Json configuration;  // what must be equal to go on
  Json extra;          // the trainer's own counters (epoch, best score, ...)
  // Files of FOLDER beside the checkpoints that this state needs, too.
  std::vector<std::string> beside{};
};

// Also removes what a killed save left in FOLDER, and checkpoints but the newest `keep`
// (>= 1), once the new one is whole.
void SaveTrainState(const fs::path& folder, const TrainState& state,
                    const Parameters& parameters, const AdamW& optimizer,
                    int keep = kKeptStates);
// Removes FOLDER/*.safetensors that no checkpoint there needs; none where one of them
// does not say what it needs.
void RemoveUnnamed(const fs::path& folder);
// The newest checkpoint's state, or nothing where there is none. Throws DataError naming
// the file where one that it needs is damaged (every byte is checked), and the newest
// checkpoint that is whole.
std::optional<TrainState> FindTrainState(const fs::path& folder);
// Its step alone, unchecked: for a look at what is there.
std::optional<int64_t> NewestStep(const fs::path& folder);
// Copies that checkpoint's tensors into parameters and optimizer.
void LoadTrainState(const fs::path& folder, int64_t step, const Parameters& parameters,
                    AdamW* optimizer);
// Removes a folder of checkpoints, if it is there; a kill on the way leaves no part of it
// under its name.
void RemoveTrainStates(const fs::path& folder);
// Removes the damaged checkpoints that are newer than the newest whole one, and says so
// on stderr; none where no checkpoint is whole.
void RemoveDamagedStates(const fs::path& folder);
// UsageError naming the first key that differs.
void CheckSameConfiguration(const Json& stored, const Json& current,
                            const fs::path& folder);

}  // namespace routecast
