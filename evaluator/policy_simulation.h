// Policies, predictors and cache rules on recorded routing under a device profile and a
// virtual clock: what would each buy, without running the model. Deterministic. Thread
// rule: one thread.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "evaluator/device_profile.h"
#include "evaluator/imagined_model.h"
#include "evaluator/recorded_visits.h"
#include "models/expert_predictor.h"
#include "storage/trace_reader.h"

namespace routecast {

struct PolicySimulationOptions {
  int d_model = 768, d_ff = 3072, vocab_size = 32128;  // of the model that is imagined
  ImaginedSizes sizes;                                 // what is known of it otherwise
  // Of the expert bytes; every row is played with each.
  std::vector<double> budget_shares = {0.25};
  std::vector<std::string> budget_names;  // of each, as it was asked for; else its share
  int sequences = 200, warmup_sequences = 4, tokens = 16;
  bool encoder =
      false;  // its pass before each sequence's steps; its experts in the budget
  // What the slots hold at the begin; null: nothing.
  std::shared_ptr<const UseShares> warm_start;
  SplitPart part = SplitPart::kTest;
  std::vector<std::string> policies = {"auto"};
  std::vector<std::string> evictions = {"lru"};
  double question_seconds = 200e-6;  // to learned predictors and baselines alike
  bool quiet = false;
};

ImaginedModel ImaginedModelOf(const DeviceProfile& profile,
                              const PolicySimulationOptions& options);
// Experts of the stacks that are played.
int NumSimulatedExperts(const MoeGeometry& geometry,
                        const PolicySimulationOptions& options);

struct SimulatedRow {
  std::string predictor, policy, eviction;
  std::string budget;  // its share as text, where rows of several are played
  int slots = 0;
  uint64_t budget_bytes = 0;
  double warm_start_seconds = 0;  // what bringing the first slots' experts takes
  double tokens_per_second = 0, speed_up = 0, hit_rate = 0, bound = 0;
  double stall_seconds = 0, seconds = 0, question_seconds = 0;  // asking: of `seconds`
  uint64_t bytes_useful = 0, bytes_late = 0, bytes_wasted = 0;
  double visits_per_second = 0;                      // of the simulator itself
  std::optional<MemoryManagerState> memory_manager;  // where the policy has one
  int64_t failed_questions = 0;  // which say nothing; the first one's words
  std::string first_failure;
  ImaginedModel imagined;
  Json ToJson() const;
};
struct PolicySimulationResult {
  DeviceProfile profile;
  ImaginedModel imagined;
  double question_us = 0;  // what each question was charged
  size_t tokens = 0;
  int sequence_tokens = 0;  // played of each sequence, from its first on, at most
  std::string warm_start;   // where slots began filled: what was counted
  // Of each budget: on-demand LRU first, resident last.
  std::vector<SimulatedRow> rows;
  Json ToJson() const;
  // rows.csv: the same rows and keys.
  std::string ToCsv() const;
};

// UsageError where no sequence of the part serves, the model has no such stack, or a
// budget holds fewer than two experts: what SimulatePolicies would refuse, without
// playing.
void CheckSimulation(const TraceReader& reader,
                     const std::vector<std::unique_ptr<ExpertPredictor>>& predictors,
                     const PolicySimulationOptions& options);
// Throws as CheckSimulation.
// `predictors` need no more than the store has (MakePredictors). On-demand with every
// eviction, every
// predictor with every policy and eviction, the oracle. Eviction by a known future is not
// among them: what it would load stands in every measured comparison.
PolicySimulationResult SimulatePolicies(
    const TraceReader& reader,
    const std::vector<std::unique_ptr<ExpertPredictor>>& predictors,
    const DeviceProfile& profile, const PolicySimulationOptions& options);
std::string PolicyTable(const PolicySimulationResult& result);

}  // namespace routecast
