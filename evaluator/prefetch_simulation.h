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

// Visits with what is told at them ranked once, in the order in which it is told, for
// simulations that play them many times. The visits outlive it.
class RankedVisits {
 public:
  explicit RankedVisits(std::span<const SimulatedVisit> visits);
  RankedVisits(const RankedVisits&) = delete;
  RankedVisits& operator=(const RankedVisits&) = delete;
  std::span<const SimulatedVisit> visits() const { return visits_; }
  enum When { kPassBegin, kLayer, kPassEnd };
  std::span<const RankedForecast> At(size_t visit, When when) const {
    const size_t i = 3 * visit + static_cast<size_t>(when);
    return {forecasts_.data() + first_[i], first_[i + 1] - first_[i]};
  }

 private:
  std::span<const SimulatedVisit> visits_;
  std::vector<RankedForecast> forecasts_;
  std::vector<ForetoldExpert> experts_;  // where they point
  std::vector<size_t> first_;            // of a visit's when, in forecasts_
};

struct SimulationResult {
  double seconds = 0, stall_seconds = 0, link_seconds = 0, question_seconds = 0;
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
                                  const RankedVisits& visits, size_t counted_from,
                                  const UseShares* warm = nullptr);
SimulationResult SimulatePrefetch(const MoeGeometry& geometry, int slots,
                                  Eviction eviction, const PlannerOptions& planner,
                                  const SimulatedLinkOptions& link,
                                  std::span<const SimulatedVisit> visits,
                                  size_t counted_from, const UseShares* warm = nullptr);

}  // namespace routecast
