// The runtime without a model: planner, cache and a serial link under a manual clock,
// over recorded visits and what was foretold at each. Deterministic, and thousands of
// times faster than running it: what planner settings are chosen with. Thread rule: one
// thread.
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "evaluator/layer_forecast.h"
#include "evaluator/prefetch_planner.h"
#include "evaluator/simulated_link.h"
#include "evaluator/use_shares.h"

namespace routecast {

// One MoE layer of one pass. Seconds are the model's own work, without waiting.
struct SimulatedVisit {
  int layer = 0;
  std::vector<int> experts;
  double seconds_before = 0;   // from the last visit's end to the pass' begin, or to here
  bool begins_pass = false;    // at_pass_begin is told after seconds_before
  double seconds_in_pass = 0;  // then, up to the layer's choice; 0 where no pass begins
  double seconds_expert = 0;   // computing one expert
  double seconds_predict = 0;  // of each question, where something is told
  // at_layer: when the layer has chosen; at_pass_end: when its experts are computed.
  std::vector<LayerForecast> at_pass_begin, at_layer, at_pass_end;
};

struct SimulationResult {
  double seconds = 0, stall_seconds = 0, link_seconds = 0;
  TransferLedger ledger;
  std::vector<double> stalls;                        // of every visit that counts
  std::optional<MemoryManagerState> memory_manager;  // where the policy has one
};

// The visits in order, counted from `counted_from` on. With `warm` the slots hold the
// most used experts of the layers that are visited before the clock starts. REQUIRES
// link.expert_bytes == planner.expert_bytes.
SimulationResult SimulatePrefetch(const MoeGeometry& geometry, int slots,
                                  Eviction eviction, const PlannerOptions& planner,
                                  const SimulatedLinkOptions& link,
                                  std::span<const SimulatedVisit> visits,
                                  size_t counted_from, const UseShares* warm = nullptr);

}  // namespace routecast
