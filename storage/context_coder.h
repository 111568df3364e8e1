// The context coder of a store (compression `context`): chunks come in with packed ids;
// when all are in, a model is counted over the whole store, sealed as context.model, and
// each shard's records are coded again with it. Until then, and whatever is killed when,
// every record is readable as it lies; starting again finishes.
// Thread rule: one thread a shard.
#pragma once

#include <memory>
#include <string>

#include "storage/context_model.h"
#include "storage/store_config.h"
#include "storage/trace_format.h"
#include "storage/trace_store.h"

namespace routecast {

class ShardDb;

fs::path ContextModelPath(const fs::path& store);
// nullptr where the store has none (yet). DataError where it is damaged or of another
// geometry.
std::unique_ptr<ContextModel> LoadContextModel(const fs::path& store,
                                               const StoreConfig& config);
// Makes the model of a complete store that is to have one, unless it is there. The model
// is a function of the store's sequences: counted over those whose hash falls into a
// share that has kMaxTrainedIds ids at most.
// REQUIRES that nobody writes to the store, and one caller.
inline constexpr uint64_t kMaxTrainedIds = uint64_t{1} << 25;
void MakeContextModel(const fs::path& store, const StoreConfig& config,
                      const StepObserver& on_step = {});

// The shard's mark that its records are coded; false where they are not.
bool ReadCoderMark(const ShardDb& shard, CoderMark* mark);
// Codes the shard's records again, in one atomic step. Does nothing where all are coded:
// where later chunks came in packed, the mark counts fewer records than the shard has.
// `staging`: a folder for the new file; removed.
void CodeShard(const ShardDb& shard, const StoreConfig& config, const ContextModel& model,
               const fs::path& staging, const StepObserver& on_step);

// Sequences of `share`, by hash: which ones are counted, whatever their order.
bool InTrainedShare(uint64_t sequence_id, double share);
// The share of the store's sequences that holds at most kMaxTrainedIds ids.
double TrainedShare(const std::vector<SequenceInfo>& sequences,
                    const MoeGeometry& geometry, int ids_a_token = 1);

}  // namespace routecast
