// Experts under a budget: the planner decides, the engine carries, the model waits.
// The model sees an ExpertSource (leases on slots) and a RoutingObserver (what to expect
// next); whatever is predicted, the bytes under a lease are that expert's, so outputs
// never change.
//
// Thread rule: Begin, Next, observers, Suspend and Resume on the forward thread; leases
// may be released from any thread; the engine reports from its own.
#pragma once

#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "evaluator/benefit_gauge.h"
#include "evaluator/expert_file.h"
#include "evaluator/foresight.h"
#include "evaluator/foresight_thread.h"
#include "evaluator/prefetch_planner.h"
#include "evaluator/question_guard.h"
#include "evaluator/timeline.h"
#include "evaluator/transfer_engine.h"
#include "evaluator/use_shares.h"
#include "models/expert_source.h"
#include "models/routing_observer.h"

namespace routecast {

struct RuntimeOptions {
  int num_slots = 2;
  Eviction eviction = Eviction::kLru;
  PlannerOptions planner;     // cancelling, and expert_bytes where 0, are filled in
  BenefitGaugeOptions gauge;  // of each stack
  // Where above 0: slots and the model's keys and values together take no more. What
  // those take at a pass' end is asked at its begin, and experts make room before it goes
  // on. REQUIRES two slots' room beside the most that they take.
  uint64_t memory_bytes = 0;
  std::function<uint64_t(const PassInfo&)> key_value_bytes;
  at::ScalarType dtype = at::kFloat;
  at::Device device = at::kCPU;
  // Questions are answered on a thread of their own while the model computes. Where there
  // is another core for it; not under a clock that stands still.
  bool ask_aside = false;
  const Clock* clock = nullptr;  // outlives the runtime; null: a steady one of its own
};

// What one stack's passes cost. Bytes and counts as in TransferLedger.
struct PhaseStats {
  int64_t passes = 0;
  double pass_seconds = 0;  // wall, without the vocabulary head
  double stall_seconds = 0, predictor_seconds = 0;
  double aside_seconds = 0;  // of answers on their own thread, up to the pass' end
  int64_t requests = 0;      // tokens x MoE layers: what `uses` would be if none shared
  int64_t uses = 0, hits = 0;
  int64_t bytes_useful = 0, bytes_late = 0, bytes_wasted = 0;
  int64_t speculations = 0, speculations_used = 0, speculations_in_time = 0,
          speculations_unused = 0;
};

class PrefetchRuntime : public ExpertSource, public RoutingObserver {
 public:
  // `engine` outlives the runtime and has at least num_slots slots of `spec`'s blobs;
  // several runtimes may share one, one at a time (Suspend, Resume). `foresight` may be
  // null.
  PrefetchRuntime(const ExpertFileSpec& spec, TransferEngine* engine,
                  std::unique_ptr<Foresight> foresight, RuntimeOptions options);
  ~PrefetchRuntime() override;

  void Begin(int layer, std::span<const int> experts) override;
  ExpertLease Next() override;
  int LeasesAtOnce() override;  // the slots in service
  void OnPassBegin(const PassInfo& pass) override;
  void OnRouting(const LayerRouting& routing) override;
  void OnPassEnd(const PassInfo& pass) override;

  // Hands the engine back: waits for what is under way and remembers which experts are
  // held.
  void Suspend();
  // Takes the engine and brings the remembered experts back; not counted anywhere. The
  // first call is the constructor's.
  void Resume();
  // Brings in every expert of `keys` now (all-resident), the last one as if it had been
  // used last. REQUIRES enough slots, and a runtime that is suspended or new.
  void Preload(const std::vector<ExpertKey>& keys);
  // The same with those of `keys` that are used most, as many as there are slots; and
  // tells the cache what is used how often. Returns how many were brought.
  int WarmStart(const UseShares& shares, const std::vector<ExpertKey>& keys);

  // By lead: what its speculation was worth, and its threshold. Empty where the policy
  // does not adapt it.
  std::vector<SpeculationAccount> speculation(Stack stack) const;

  // nullopt where the policy has no memory manager.
  std::optional<MemoryManagerState> memory_manager() const;

  // Since ResetStats. The stack's experts that are prefetched but not used yet are
  // wasted.
  PhaseStats stats(Stack stack) const;
  void ResetStats();
  int held_peak_slots() const { return held_peak_; }
  // Fewest slots in service, and the most bytes of slots in service with keys and values.
  int least_slots() const { return least_slots_; }
  uint64_t memory_peak_bytes() const { return memory_peak_; }
  bool speculation_helps(Stack stack) const {
    return gauges_[static_cast<int>(stack)].helps();
  }
  const BenefitGauge& gauge(Stack stack) const {
    return gauges_[static_cast<int>(stack)];
  }
  double measured_link_bytes_per_second() const;
  // Which questions failed, and so say nothing.
  const QuestionGuard& questions() const { return questions_; }
  // The visits since the last TakeVisits, in order (what an oracle is told).
  std::vector<OracleForesight::Visit> TakeVisits();
  Foresight* foresight() { return foresight_.get(); }
  // What happens from now on is written there; null = nowhere. While nothing runs.
  void SetTimeline(Timeline* timeline);
  // For tests that damage it: the memory of the slot that holds `key`, null where absent.
  std::byte* MemoryOf(ExpertKey key);

 private:
  void FitMemory(const PassInfo& pass);
  ExpertWeights WeightsAt(std::byte* memory) const;
  void Act();  // lock held: polls the planner and drives the engine
  void WatchTransfer(uint64_t id, TransferOutcome outcome);  // lock held
  void OnDone(uint64_t id, TransferOutcome outcome, uint64_t bytes);
  void Release(ExpertKey key, double taken);
  // Puts a question of the timeline's name `what`; its answer goes to the planner. `news`
  // is what the foresight is told where a later question comes before its turn.
  void Ask(const char* what, std::function<std::vector<LayerForecast>()> question,
           std::function<void()> news);
  // Tells the foresight something without a question, in order with them.
  void Tell(std::function<void()> news);
  // Lock held. `visit`: the planner's when the question was put; `epoch`: of the
  // predictions then.
  void Foresee(const std::vector<LayerForecast>& forecasts, long visit, long epoch);
  void ForgetPredictions();  // lock held
  PassInfo Kept(const PassInfo& pass) const;
  LayerRouting Kept(const LayerRouting& routing) const;
  void Wait(std::unique_lock<std::mutex>* lock);  // for the next event of the engine
  void WaitIdle(std::unique_lock<std::mutex>* lock);
  bool Speculating() const;
  bool AnyGaugeNeedsPredictor() const;

  ExpertFileSpec spec_;
  TransferEngine* engine_;
  std::unique_ptr<Foresight> foresight_;
  RuntimeOptions options_;
  SteadyClock steady_clock_;
  const Clock& clock_;  // that one, or the options'
  mutable std::mutex mutex_;
  std::condition_variable arrived_;
  ExpertCache cache_;
  PrefetchPlanner planner_;
  std::vector<ExpertWeights> slots_;  // views of slot memory; none where read in place
  BenefitGauge gauges_[2];
  bool runs_[2] = {false, false};  // stacks that have been seen
  // Whether the foresight is told of this sequence. Where speculation is off it is not:
  // keeping its window costs a small model's step some hundredths.
  bool following_ = true;
  PhaseStats stats_[2];
  TransferLedger last_ledger_;
  LayerRouting pending_;  // told by OnRouting, used in Begin after the demand
  bool has_pending_ = false;
  Stack stack_ = Stack::kEncoder;
  double pass_begin_ = 0, stall_ = 0, predict_ = 0;
  double aside_ = 0;  // seconds of answers since the last pass' end, on their own thread
  QuestionGuard questions_;
  long epoch_ = 0;  // grows where predictions are forgotten: late answers are void
  int held_peak_ = 0, least_slots_ = 0;
  uint64_t memory_peak_ = 0;
  bool active_ = false;
  std::vector<uint64_t> restoring_;  // transfers of Resume or Preload still under way
  bool restore_failed_ = false;
  uint64_t next_restore_ = uint64_t{1} << 62;  // ids apart from the planner's
  std::vector<OracleForesight::Visit> visits_;
  Timeline* timeline_ = nullptr;
  struct WatchedTransfer {
    TransferOrder order;
    double started = 0;
  };
  std::map<uint64_t, WatchedTransfer> watched_;  // under way, where a timeline is kept
  std::unique_ptr<ForesightThread> thread_;      // last: it ends first; null: none
};

}  // namespace routecast
