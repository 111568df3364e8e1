// The predictors that a command names, from names and folders. Thread rule: one thread.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "evaluator/use_shares.h"
#include "models/checkpoint.h"
#include "models/expert_predictor.h"
#include "storage/trace_reader.h"

namespace routecast {

// `names` without none and oracle, which are rows of their own, preceded by those
// baselines of `which` that are not among them: none, simple (what is counted, and the
// stale gate) or all. UsageError naming the nearest: of names, and of trained runs in the
// present folder.
std::vector<std::string> WithBaselines(std::vector<std::string> names,
                                       const std::string& which);

// What those who ask predictors can tell them: a model that runs all of it, records what
// was recorded or imported.
struct ToldInputs {
  bool token_ids = true, router_inputs = true;
};
ToldInputs ToldBy(const TraceReader& records);

// `asked`: what the user named, which must be there: UsageError where it needs what is
// not told. Runs of one kind get labels with their folders' names. Others are left out
// where the store or the model cannot serve them. Baselines are counted over the train
// part of `reader` (may be null: UsageError where one is asked for).
std::vector<std::unique_ptr<ExpertPredictor>> MakePredictors(
    const std::vector<std::string>& names, const std::vector<std::string>& asked,
    const MoeGeometry& geometry, const std::vector<RouterWeights>& routers,
    const TraceReader* reader, bool quiet, ToldInputs told = {});

// How often the store's train part used each expert. UsageError where its model has
// another geometry.
UseShares CountUses(const TraceReader& reader, const MoeGeometry& geometry);

// Of a store; empty where it has none.
std::vector<RouterWeights> StoredRouters(const TraceReader& reader);

// The ids that decoders of the store's train part say most often, `count` of them, the
// most frequent first, equals by id; none where the vocabulary has no more than that.
std::vector<int64_t> FrequentIds(const TraceReader& reader, int64_t vocab_size,
                                 int64_t count);

}  // namespace routecast
