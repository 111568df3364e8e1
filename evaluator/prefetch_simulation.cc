#include "evaluator/prefetch_simulation.h"

#include <algorithm>
#include <stdexcept>

namespace routecast {
namespace {

class Simulation {
 public:
  Simulation(const MoeGeometry& geometry, int slots, Eviction eviction,
             const PlannerOptions& planner, const SimulatedLinkOptions& link)
      : cache_(geometry, slots, eviction),
        planner_(planner, &cache_, &clock_),
        link_(link, &clock_),
        speculates_(planner.policy.speculate) {
    link_.SetDone([this](uint64_t id, TransferOutcome outcome, uint64_t bytes) {
      planner_.OnDone(id, outcome, bytes);
      Act();
    });
  }

  // For an eviction that knows the future: the uses of all visits, in order.
  void TellFuture(std::span<const SimulatedVisit> visits) {
    std::vector<ExpertKey> uses;
    for (const SimulatedVisit& visit : visits) {
      for (int expert : visit.experts) uses.push_back({visit.layer, expert});
    }
    cache_.SetFuture(uses);
  }

  // Returns what was waited.
  double Run(const SimulatedVisit& visit) {
    Work(visit.seconds_before);
    if (visit.begins_pass) {
      planner_.BeginPass(false);  // nothing rests here
      Tell(visit.at_pass_begin, visit.seconds_predict);
      Work(visit.seconds_in_pass);
    }
    planner_.BeginLayer(visit.layer, visit.experts);
    Act();
    Tell(visit.at_layer, visit.seconds_predict);
    double waited = 0;
    for (size_t served = 0; served < visit.experts.size(); ++served) {
      std::optional<ExpertKey> key;
      const double from = clock_.Now();
      while (!(key = planner_.TakeReady())) link_.Step();
      planner_.AddStall(clock_.Now() - from);
      waited += clock_.Now() - from;
      Work(visit.seconds_expert);
      planner_.Release(*key);
      Act();
    }
    Tell(visit.at_pass_end, visit.seconds_predict);
    return waited;
  }

  void WarmStart(const UseShares& shares, const std::vector<ExpertKey>& keys) {
    cache_.SetPrior(shares.by_key);
    for (const ExpertKey key :
         MostUsed(shares, cache_.geometry(), keys, size_t(cache_.num_slots()))) {
      cache_.Load(key);
      cache_.Arrive(key);
      cache_.Touch(key);
    }
  }

  double now() const { return clock_.Now(); }
  PrefetchPlanner* planner() { return &planner_; }

 private:
  void Work(double seconds) { link_.AdvanceTo(clock_.Now() + seconds); }

  void Tell(const std::vector<LayerForecast>& forecasts, double seconds) {
    if (!speculates_ || forecasts.empty()) return;
    Work(seconds);
    for (const LayerForecast& forecast : forecasts) planner_.Predict(forecast);
    Act();
  }

  void Act() {
    const PlannerActions& actions = planner_.Poll();
    for (uint64_t id : actions.promote) link_.Promote(id);
    for (uint64_t id : actions.cancel) link_.Cancel(id);
    for (const TransferOrder& order : actions.start) link_.Start(order);
  }

  ManualClock clock_;
  ExpertCache cache_;
  PrefetchPlanner planner_;
  SimulatedLink link_;
  bool speculates_;
};

// Asks for what will be told at a visit some visits ahead: a recording is larger than the
// caches, and its numbers lie behind two pointers.
void FetchAhead(std::span<const SimulatedVisit> visits, size_t at) {
#if defined(__GNUC__)
  constexpr size_t kNear = 2, kFar = 6, kFloatsALine = 16;
  if (at + kFar < visits.size()) __builtin_prefetch(visits[at + kFar].at_layer.data());
  if (at + kNear >= visits.size()) return;
  for (const LayerForecast& forecast : visits[at + kNear].at_layer) {
    const std::vector<float>& p = forecast.probabilities;
    for (size_t i = 0; i < p.size(); i += kFloatsALine) __builtin_prefetch(&p[i]);
  }
#endif
}

// Of the layers that are visited.
std::vector<ExpertKey> KeysOf(std::span<const SimulatedVisit> visits,
                              const MoeGeometry& g) {
  std::vector<ExpertKey> keys;
  for (int layer = 0; layer < g.num_layers(); ++layer) {
    const bool visited =
        std::any_of(visits.begin(), visits.end(),
                    [&](const SimulatedVisit& visit) { return visit.layer == layer; });
    for (int expert = 0; visited && expert < g.num_experts; ++expert)
      keys.push_back({layer, expert});
  }
  return keys;
}

}  // namespace

SimulationResult SimulatePrefetch(const MoeGeometry& geometry, int slots,
                                  Eviction eviction, const PlannerOptions& planner,
                                  const SimulatedLinkOptions& link,
                                  std::span<const SimulatedVisit> visits,
                                  size_t counted_from, const UseShares* warm) {
  if (planner.expert_bytes != link.expert_bytes) {
    throw std::logic_error("SimulatePrefetch: planner and link disagree on an expert");
  }
  Simulation simulation(geometry, slots, eviction, planner, link);
  if (eviction == Eviction::kBelady) simulation.TellFuture(visits);
  if (warm) simulation.WarmStart(*warm, KeysOf(visits, geometry));
  SimulationResult result;
  result.stalls.reserve(visits.size());
  double begin = 0;
  for (size_t i = 0; i < visits.size(); ++i) {
    if (i == counted_from) {
      begin = simulation.now();
      simulation.planner()->ResetLedger();
    }
    FetchAhead(visits, i);
    const double stall = simulation.Run(visits[i]);
    if (i < counted_from) continue;
    result.stalls.push_back(stall);
    result.stall_seconds += stall;
  }
  result.seconds = simulation.now() - begin;
  result.ledger = simulation.planner()->ledger();
  if (const MemoryManager* manager = simulation.planner()->memory_manager())
    result.memory_manager = manager->state();
  result.link_seconds =
      static_cast<double>(result.ledger.bytes_moved()) / link.bytes_per_second;
  return result;
}

}  // namespace routecast
