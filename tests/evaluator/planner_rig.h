// A planner, its cache and a link under a manual clock, for tests of what is decided.
#pragma once

#include <stdexcept>
#include <utility>
#include <vector>

#include "evaluator/prefetch_planner.h"
#include "evaluator/simulated_link.h"

namespace routecast {

inline SpeculationPolicy Eager() { return {"eager", true, 4, 8, 0.01, false, false}; }

// The link takes 1 s an expert, in chunks of a quarter.
struct Rig {
  explicit Rig(int slots, SpeculationPolicy policy = Eager(), bool can_cancel = true,
               double late_allowance = 1, MoeGeometry geometry = {0, 2, 4, 1, 8},
               Eviction eviction = Eviction::kLru)
      : cache(geometry, slots, eviction),
        planner({1000, 1000, 2, late_allowance, can_cancel, std::move(policy)}, &cache,
                &clock),
        link({1000, 250, 1000, 0, can_cancel}, &clock) {
    link.SetDone([this](uint64_t id, TransferOutcome outcome, uint64_t bytes) {
      planner.OnDone(id, outcome, bytes);
      Drive();
    });
  }
  void Drive() {
    const PlannerActions actions = planner.Poll();
    for (uint64_t id : actions.promote) link.Promote(id);
    for (uint64_t id : actions.cancel) link.Cancel(id);
    for (const TransferOrder& order : actions.start) link.Start(order);
    started.insert(started.end(), actions.start.begin(), actions.start.end());
    cancelled += static_cast<int>(actions.cancel.size());
  }
  // Runs one layer to its end, waiting where it must, then computes. Returns the wait.
  double Layer(int layer, std::vector<int> experts, double compute = 0) {
    planner.BeginLayer(layer, experts);
    Drive();
    const double from = clock.Now();
    while (!planner.AllServed()) {
      if (const auto key = planner.TakeReady()) {
        planner.Release(*key);
        Drive();
      } else {
        if (link.NextEvent() < 0) throw std::runtime_error("deadlock");
        link.AdvanceTo(link.NextEvent());
      }
    }
    const double wait = clock.Now() - from;
    planner.AddStall(wait);
    link.AdvanceTo(clock.Now() + compute);
    return wait;
  }
  void Predict(int layer, int distance, std::vector<float> probabilities) {
    planner.Predict(layer, distance, probabilities);
    Drive();
  }
  ManualClock clock;
  ExpertCache cache;
  PrefetchPlanner planner;
  SimulatedLink link;
  std::vector<TransferOrder> started;
  int cancelled = 0;
};

}  // namespace routecast
