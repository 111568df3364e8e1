// What the comparisons of one command share: store, model, predictors, requests, experts
// on disk. Thread rule: one thread.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "evaluator/evaluation.h"
#include "evaluator/expert_tiers.h"
#include "evaluator/requests.h"
#include "evaluator/tier_spec.h"
#include "evaluator/use_shares.h"
#include "models/next_token_guess.h"
#include "storage/trace_reader.h"

namespace routecast {

// Where the model runs and through which memories its experts come: --device and --tier.
struct Placement {
  at::Device device = at::kCPU;
  ExpertTierOptions tiers;
};
// UsageError where the two do not fit together, EnvironmentError: no such device. A share
// of a device's memory becomes bytes: the device is opened to look at it.
Placement PlacementOf(const EvaluationOptions& options);
// The same with shares as they are given, and no device opened.
Placement UnsizedPlacementOf(const EvaluationOptions& options);

struct EvaluationSetup {
  std::unique_ptr<TraceReader> reader;   // null without --store
  std::optional<Checkpoint> checkpoint;  // generate: without experts
  MoeGeometry geometry;                  // of what runs
  Placement placement;
  std::vector<std::unique_ptr<ExpertPredictor>> predictors;  // by policy
  // Null where it is not asked for, or the vocabulary head is not known.
  std::shared_ptr<const NextTokenGuess> next_token;
  std::unique_ptr<ExpertPredictor> scheduler;  // foretells routes of whole requests
  std::vector<RequestSet> requests;
  std::shared_ptr<const UseShares> warm_start;  // null: slots begin empty
  std::shared_ptr<const ExpertFile> file;       // null in a dry run
};

inline bool IsReplay(const EvaluationOptions& options) { return options.model.empty(); }
inline bool RunsEncoder(const EvaluationOptions& o) {
  return !IsReplay(o) || o.phase != "decoder";
}
inline bool RunsDecoder(const EvaluationOptions& o) {
  return !IsReplay(o) || o.phase != "encoder";
}

// --warm_start: `store` is what auto counts, and may be null; null where it says none.
// UsageError, DataError: nothing that can be counted, or of another geometry.
std::shared_ptr<const UseShares> WarmStartOf(const std::string& warm_start,
                                             const TraceReader* store,
                                             const MoeGeometry& geometry);
// Of the fastest tier: --tier's (`chain`, with sizes), or what `budget` (of
// --expert_budget) comes to of `whole_bytes`.
// UsageError where both say a size and these differ.
uint64_t BudgetOf(const EvaluationOptions& options, const TierChain& chain,
                  const std::string& budget, uint64_t whole_bytes);

// Reads everything; prints the plan instead of writing experts where dry_run.
EvaluationSetup SetUpEvaluation(const EvaluationOptions& options);

// The first requests of `set`, as many as the rounds take at most, in batches.
enum class Schedule { kInOrder, kByRoute };
std::unique_ptr<Workload> MakeWorkload(const EvaluationOptions& options,
                                       const EvaluationSetup& setup,
                                       const RequestSet& set, int batch,
                                       Schedule schedule);

}  // namespace routecast
