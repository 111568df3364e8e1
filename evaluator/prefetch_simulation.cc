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
  double Run(const RankedVisits& all, size_t at) {
    const SimulatedVisit& visit = all.visits()[at];
    Work(visit.seconds_before);
    if (visit.begins_pass) {
      planner_.BeginPass(false);  // nothing rests here
      Tell(all.At(at, RankedVisits::kPassBegin), visit.seconds_predict);
      Work(visit.seconds_in_pass);
    }
    planner_.BeginLayer(visit.layer, visit.experts);
    Act();
    Tell(all.At(at, RankedVisits::kLayer), visit.seconds_predict);
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
    Tell(all.At(at, RankedVisits::kPassEnd), visit.seconds_predict);
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
  double question_seconds() const { return question_seconds_; }
  PrefetchPlanner* planner() { return &planner_; }
  const ExpertCache& cache() const { return cache_; }

 private:
  void Work(double seconds) { link_.AdvanceTo(clock_.Now() + seconds); }

  void Tell(std::span<const RankedForecast> forecasts, double seconds) {
    if (!speculates_ || forecasts.empty()) return;
    Work(seconds);
    question_seconds_ += seconds;
    for (const RankedForecast& forecast : forecasts) planner_.Predict(forecast);
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
  double question_seconds_ = 0;
};

// Asks for the numbers of experts that may have to leave, as will be told of them some
// visits ahead: a recording is larger than the caches, and a look at one number would
// wait for memory.
void FetchAhead(const RankedVisits& ranked, size_t at, const ExpertCache& cache) {
#if defined(__GNUC__)
  constexpr size_t kAhead = 3, kExperts = 3;
  if (at + kAhead >= ranked.visits().size()) return;
  __builtin_prefetch(ranked.visits()[at + kAhead].experts.data());
  for (const RankedForecast& f : ranked.At(at + kAhead, RankedVisits::kLayer)) {
    const auto held = cache.HeldByRate(f.layer);
    for (size_t i = 0; i < std::min(kExperts, held.size()); ++i)
      __builtin_prefetch(f.probabilities.data() + held[i].expert);
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

RankedVisits::RankedVisits(std::span<const SimulatedVisit> visits) : visits_(visits) {
  std::vector<size_t> ends;  // of each forecast's experts
  std::vector<ForetoldExpert> ranked;
  first_.push_back(0);
  const auto add = [&](const std::vector<LayerForecast>& told) {
    for (const LayerForecast& f : told) {
      const bool sound = RankExperts(f.probabilities, kRankedFrom, &ranked);
      if (sound) experts_.insert(experts_.end(), ranked.begin(), ranked.end());
      forecasts_.push_back({f.layer, f.distance, sound, f.probabilities, {}});
      ends.push_back(experts_.size());
    }
    first_.push_back(forecasts_.size());
  };
  for (const SimulatedVisit& visit : visits) {
    add(visit.at_pass_begin);
    add(visit.at_layer);
    add(visit.at_pass_end);
  }
  for (size_t i = 0, from = 0; i < ends.size(); from = ends[i++]) {
    forecasts_[i].ranked = {experts_.data() + from, ends[i] - from};
  }
}

SimulationResult SimulatePrefetch(const MoeGeometry& geometry, int slots,
                                  Eviction eviction, const PlannerOptions& planner,
                                  const SimulatedLinkOptions& link,
                                  const RankedVisits& ranked, size_t counted_from,
                                  const UseShares* warm) {
  const std::span<const SimulatedVisit> visits = ranked.visits();
  if (planner.expert_bytes != link.expert_bytes) {
    throw std::logic_error("SimulatePrefetch: planner and link disagree on an expert");
  }
  Simulation simulation(geometry, slots, eviction, planner, link);
  if (eviction == Eviction::kBelady) simulation.TellFuture(visits);
  if (warm) simulation.WarmStart(*warm, KeysOf(visits, geometry));
  SimulationResult result;
  result.stalls.reserve(visits.size());
  double begin = 0, asked_before = 0;
  for (size_t i = 0; i < visits.size(); ++i) {
    if (i == counted_from) {
      begin = simulation.now();
      asked_before = simulation.question_seconds();
      simulation.planner()->ResetLedger();
    }
    FetchAhead(ranked, i, simulation.cache());
    const double stall = simulation.Run(ranked, i);
    if (i < counted_from) continue;
    result.stalls.push_back(stall);
    result.stall_seconds += stall;
  }
  result.seconds = simulation.now() - begin;
  result.question_seconds = simulation.question_seconds() - asked_before;
  result.ledger = simulation.planner()->ledger();
  if (const MemoryManager* manager = simulation.planner()->memory_manager())
    result.memory_manager = manager->state();
  result.link_seconds =
      static_cast<double>(result.ledger.bytes_moved()) / link.bytes_per_second;
  return result;
}

SimulationResult SimulatePrefetch(const MoeGeometry& geometry, int slots,
                                  Eviction eviction, const PlannerOptions& planner,
                                  const SimulatedLinkOptions& link,
                                  std::span<const SimulatedVisit> visits,
                                  size_t counted_from, const UseShares* warm) {
  return SimulatePrefetch(geometry, slots, eviction, planner, link, RankedVisits(visits),
                          counted_from, warm);
}

}  // namespace routecast
