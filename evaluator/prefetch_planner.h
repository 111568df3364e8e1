// Which expert is moved next? Predictions, cache and clock in; ordered transfers out.
// A plain state machine: the runtime drives it with a steady clock and a real engine,
// tests and the simulated link with a manual clock. It never blocks and starts nothing
// itself. Thread rule: one thread at a time (the owner's lock).
//
// Rules it keeps:
// - demand (the model waits) goes before speculation; one of the two places in flight is
//   closed to speculation, so a demand never stands behind a speculation that has not
//   started;
// - at most max_in_flight transfers are under way, and each expert at most once: a demand
//   for an expert that is under way joins its transfer;
// - a speculation that cannot arrive before its deadline is not started;
// - speculation takes the slot of an expert only when that expert is worth less, by
//   probability and by when it is next expected, than the one it brings; what the running
//   layer needs is never evicted;
// - where the cache is phase-aware, what the encoder has passed leaves before all else,
//   and on a link that is idle while the encoder runs the decoder's most used experts are
//   warmed into free slots and those, if they can be there before the decoder begins;
//   whatever is demanded or foretold with some certainty goes before that;
// - no more slots are in service than SetCapacity allows, as soon as experts that are not
//   leased, needed or on their way leave enough of them.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "evaluator/clock.h"
#include "evaluator/expert_cache.h"
#include "evaluator/expert_worth.h"
#include "evaluator/later_shares.h"
#include "evaluator/layer_forecast.h"
#include "evaluator/layer_timeline.h"
#include "evaluator/link_use.h"
#include "evaluator/memory_manager.h"
#include "evaluator/speculation_ledger.h"

namespace routecast {

// What to speculate on. `name` as in --policy.
struct SpeculationPolicy {
  std::string name = "auto";
  bool speculate = true;
  int max_lead = 3;  // layer visits ahead
  // Candidates a layer ahead, for each expert that a token takes.
  int top_k = 4;
  double min_probability = 0.2;  // below: not worth the link
  bool adapt_k = false;          // top_k follows the share of uses that were in time
  bool auto_off = false;         // evaluator/benefit_gauge.h may switch it off
  bool adapt_threshold = false;  // by stack and lead: evaluator/speculation_ledger.h
  bool heed_later_use = true;    // where a predictor says it: evaluator/later_shares.h
  // With adapt_k: +4 or -2 where fewer than 93 % or more than 97 % of the last hundred
  // uses were in time, from 8 on and up to E/2 candidates. Without: a step each use.
  bool in_band = false;
  // Share of the slots in service that may be spoken for (needed, leased, on their way,
  // prefetched and not used yet) where a speculation starts, itself counted.
  double pressure_limit = 1;
  // How many and how far ahead follows from the slots, confidence and load times
  // (memory_manager.h), with these to begin with; top_k then has no meaning.
  bool memory_manager = false;
  int most_experts = 2;  // for each expert that a token takes
  double aggressiveness = 0.8;
};
// on_demand, multi_look, top_k, adaptive_top_k, intelligent, confident, memory_manager,
// auto; UsageError naming the nearest.
SpeculationPolicy ParsePolicy(const std::string& name);
// The same for a model of this geometry: where tokens take several experts, auto looks
// ahead to a layer's next turn, as who stays till then decides more than what is fetched.
SpeculationPolicy PolicyFor(const std::string& name, const MoeGeometry& geometry);
// The names of a list, `all` being every policy that speculates. UsageError also where
// there is none, or one twice.
std::vector<std::string> ParsePolicies(const std::vector<std::string>& names);

struct PlannerOptions {
  uint64_t expert_bytes = 0;
  double link_bytes_per_second = 1e9;  // first estimate; then measured
  int max_in_flight = 2;
  // How much later than its need a speculation may arrive, as a share of one transfer.
  // Above 0 only where the engine can cancel: a late head start still shortens the wait,
  // and a wrong one gives the link back.
  double late_allowance = 0;
  bool engine_can_cancel = false;
  SpeculationPolicy policy;
};

struct TransferOrder {
  uint64_t id = 0;
  ExpertKey key;
  int slot = -1;
  bool demand = false;
};

struct PlannerActions {
  std::vector<TransferOrder> start;    // in this order
  std::vector<uint64_t> promote;       // speculations that a demand joined
  std::vector<uint64_t> cancel;        // speculations that turned out wrong; best effort
  std::vector<ExpertKey> evicted;      // since the last Poll, for those who watch
  std::vector<int> retired, restored;  // slots out of service, and back in it
};

enum class TransferOutcome { kArrived, kCancelled, kFailed };

// Bytes by what became of them; useful + late + wasted = moved.
struct TransferLedger {
  uint64_t uses = 0, hits = 0;  // demand requests, and those that found the expert ready
  uint64_t bytes_useful = 0;    // demanded, or prefetched in time and used
  uint64_t bytes_late = 0;      // prefetched, but the model waited for the rest of it
  uint64_t bytes_wasted = 0;    // prefetched and never used, or cancelled on the way
  // Started; of those, once it is known: used, and there when it was needed; not used.
  uint64_t speculations = 0, speculations_used = 0, speculations_in_time = 0;
  uint64_t speculations_unused = 0;
  uint64_t bytes_moved() const { return bytes_useful + bytes_late + bytes_wasted; }
};

class PrefetchPlanner {
 public:
  // `cache` and `clock` outlive the planner. REQUIRES >= 2 slots: one expert runs while
  // the next one arrives.
  PrefetchPlanner(PlannerOptions options, ExpertCache* cache, const Clock* clock);
  PrefetchPlanner(const PrefetchPlanner&) = delete;
  PrefetchPlanner& operator=(const PrefetchPlanner&) = delete;

  // A pass starts; `rested` as LayerTimeline has it.
  void BeginPass(bool rested);
  // The model starts `layer` and needs `experts` (distinct). REQUIRES the last layer's to
  // be served and released.
  void BeginLayer(int layer, std::span<const int> experts);
  // A needed expert that is ready and not yet served: pinned until Release. nullopt:
  // wait.
  std::optional<ExpertKey> TakeReady();
  bool AllServed() const { return unserved_.empty(); }
  void Release(ExpertKey key);
  // Seconds that the model waited in this visit (for the timeline).
  void AddStall(double seconds) { stall_ += seconds; }

  // Probability that each expert [E] of `layer` is needed `distance` >= 1 visits ahead;
  // replaces what was said of that visit before.
  void Predict(int layer, int distance, std::span<const float> probabilities);
  // The same without a copy: the caller keeps the forecast until that visit is over or
  // the predictions are forgotten.
  void Predict(const RankedForecast& forecast);
  // Share of the later visits of `layer` that use each expert [E]: of those that no
  // forecast reaches. Copied; it stands until more is said, the other stack runs, or two
  // turns have passed.
  void PredictLater(int layer, std::span<const float> shares);
  void ForgetPredictions();
  // Whether a phase-aware cache is warmed for the decoder. It is where the policy
  // speculates at all, unless this says otherwise.
  void SetWarming(bool warms) { warms_ = warms; }

  // How many slots may be in service from the next Poll on. REQUIRES 2 <= slots <= those
  // of the cache.
  void SetCapacity(int slots);
  bool within_capacity() const {
    return cache_->num_slots() - cache_->retired_slots() <= capacity_;
  }

  // What to do now, until the next Poll. Call after every event.
  const PlannerActions& Poll();
  // The engine's report on a transfer; `bytes` really moved.
  void OnDone(uint64_t id, TransferOutcome outcome, uint64_t bytes);
  // A demand that failed: the expert that cannot be brought.
  std::optional<ExpertKey> failed() const { return failed_; }

  int in_flight() const { return static_cast<int>(flights_.size()); }
  bool idle() const { return flights_.empty() && demands_.empty(); }
  // What speculation was worth by lead, and the thresholds where the policy adapts them.
  const SpeculationLedger& speculation() const { return accounts_; }
  // Null where the policy has none.
  const MemoryManager* memory_manager() const { return manager_ ? &*manager_ : nullptr; }
  double top_k() const { return top_k_; }
  double Worth(ExpertKey key) { return worth_.Of(key); }
  double TransferSeconds() const { return transfer_seconds_; }
  const LayerTimeline& timeline() const { return timeline_; }
  // Transfers whose fate is known: an expert prefetched but not used yet is in none of
  // the counts, and is useful at its first use, wasted at its eviction.
  const TransferLedger& settled() const { return ledger_; }
  // Of the others, by the expert's stack.
  uint64_t Unsettled(Stack stack) const;
  uint64_t UnsettledBytes(Stack stack) const {
    return Unsettled(stack) * options_.expert_bytes;
  }
  // If everything ended now: what is not settled counts as wasted.
  TransferLedger ledger() const;
  void ResetLedger();

 private:
  struct Flight {
    TransferOrder order;
    double started = 0;
    long visit = 0;       // that it is for
    bool joined = false;  // a demand waits for it
    bool cancelling = false;
    bool warming = false;
    int lead = 0;         // at which it was foretold; 0: demand, warming
    ExpertKey behind{};   // a demand: the speculation's layer and
    int behind_lead = 0;  // lead that had the link when it started; 0: none
    double moved = 0;     // share that had been moved when a demand joined
  };
  struct Candidate {
    ExpertKey key;
    long visit = 0;
    double score = 0;
    int lead = 0;
  };
  struct Row {  // what is left of one visit's candidates
    const VisitForecast* forecast = nullptr;
    size_t next = 0;   // of its ranked experts; absent
    double score = 0;  // of that one; -1: none is left
  };
  // When the link is free, and how long the model will have waited by then.
  struct LinkOutlook {
    bool known = false;
    double now = 0, free = 0, stall = 0;
  };
  void FitCapacity(PlannerActions* actions);
  void StartDemands(PlannerActions* actions);
  void CancelWrong(PlannerActions* actions);
  void StartSpeculations(PlannerActions* actions);
  VisitForecast* Entry(int layer, int distance);  // null: not to be speculated on
  // False where a number is no probability.
  bool Foresee(VisitForecast* forecast, std::span<const float> probabilities) const;
  float LeastProbability(int layer) const;  // of a candidate
  void ApplyThreshold(VisitForecast* forecast);
  void JudgeForecast(int layer, std::span<const int> experts);
  Stack StackOf(ExpertKey key) const { return cache_->geometry().StackOf(key.layer); }
  // The absent experts among what was foretold, best first, of equals the sooner needed,
  // until `act` returns false.
  template <typename Act>
  void EachCandidate(const Act& act);
  void Advance(Row* row) const;
  // Share of the flight that the link has moved by now.
  double MovedShare(const Flight& flight) const;
  // True where news made another speculation better than finishing this one.
  bool Outdone(const Flight& flight);
  double Score(double probability, long visit) const;
  LinkOutlook OutlookOfLink() const;
  bool ArrivesInTime(const Candidate& candidate, const LinkOutlook& link) const;
  bool MakeRoomFor(const Candidate& candidate);
  // One transfer for the decoder, where the encoder leaves the link idle.
  void StartWarming(PlannerActions* actions);
  std::optional<ExpertKey> LikeliestOfDecoder() const;  // of those absent
  // Its worth counts only where anything is foreseen and it has not Passed.
  std::optional<ExpertWorth::Key> PickVictim();
  TransferOrder Launch(ExpertKey key, bool demand, long visit);
  void Evict(ExpertKey key);
  void AdaptTopK(bool in_time);
  double MostCandidatesEver() const;  // as top_k is adapted, and for as many
  double LeastOfBand() const;
  // Experts of a visit that are candidates.
  size_t MostCandidates(std::span<const ForetoldExpert> ranked) const;
  int choices() const { return cache_->geometry().experts_per_token; }
  // True where one more speculation would leave too few slots for whatever comes.
  bool UnderPressure() const;
  void SetUnused(ExpertKey key, uint8_t value);

  PlannerOptions options_;
  ExpertCache* cache_;
  const Clock* clock_;
  LayerTimeline timeline_;
  VisitForecasts forecasts_;
  LaterShares later_;
  ExpertWorth worth_;
  std::vector<ExpertKey> unserved_;  // needed by this layer, not yet handed out
  std::vector<ExpertKey> demands_;   // of those: absent, transfer not yet started
  std::vector<Flight> flights_;      // in starting order
  SpeculationLedger accounts_;
  LinkUse link_use_;
  // By key: prefetched and not used yet; 1 + the lead at which it was foretold, else 0.
  std::vector<uint8_t> unused_;
  int num_unused_ = 0;
  std::optional<MemoryManager> manager_;
  int window_uses_ = 0, window_in_time_ = 0;  // of AdaptTopK
  struct Displaced {  // by key: what pushed it out, and after how many uses of any expert
    Stack stack = Stack::kEncoder;
    int lead = 0;  // 0: nothing
    uint64_t uses = 0;
  };
  std::vector<Displaced> displaced_;
  std::vector<uint64_t> promotions_;
  std::vector<ExpertKey> evicted_;
  PlannerActions actions_;
  std::vector<Row> rows_;  // of EachCandidate
  std::optional<ExpertKey> failed_;
  std::vector<ExpertKey> cold_;  // whose warming failed: not tried again
  bool warms_ = true;
  uint64_t next_id_ = 1;
  double stall_ = 0, transfer_seconds_ = 0, last_done_ = -1;
  int capacity_;  // slots in service, at most
  double top_k_;
  TransferLedger ledger_;
};

}  // namespace routecast
