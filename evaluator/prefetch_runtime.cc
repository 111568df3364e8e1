#include "evaluator/prefetch_runtime.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "common/errors.h"
#include "common/foreign_text.h"

namespace routecast {
namespace {

PlannerOptions Filled(PlannerOptions options, const ExpertFileSpec& spec,
                      const TransferEngine& engine) {
  // Less than an expert is moved where it is compressed on the way.
  if (options.expert_bytes == 0) options.expert_bytes = spec.blob_bytes();
  options.engine_can_cancel = engine.can_cancel();
  // Where a wrong transfer can be cancelled, a late one is still worth its head start.
  options.late_allowance = engine.can_cancel() ? 0.95 : 0;
  return options;
}

std::string NameOf(ExpertKey key) {
  return "layer " + std::to_string(key.layer) + " expert " + std::to_string(key.expert);
}

}  // namespace

PrefetchRuntime::PrefetchRuntime(const ExpertFileSpec& spec, TransferEngine* engine,
                                 std::unique_ptr<Foresight> foresight,
                                 RuntimeOptions options)
    : spec_(spec),
      engine_(engine),
      foresight_(std::move(foresight)),
      options_(std::move(options)),
      clock_(options_.clock ? *options_.clock : steady_clock_),
      cache_(spec.geometry, options_.num_slots, options_.eviction),
      planner_(Filled(options_.planner, spec, *engine), &cache_, &clock_),
      gauges_{BenefitGauge(options_.gauge), BenefitGauge(options_.gauge)} {
  least_slots_ = options_.num_slots;
  for (int slot = 0; slot < options_.num_slots && !engine->reads_in_place(); ++slot)
    slots_.push_back(WeightsAt(engine->slot(slot)));
  if (options_.ask_aside && foresight_) thread_ = std::make_unique<ForesightThread>();
  Resume();
}

PrefetchRuntime::~PrefetchRuntime() {
  thread_.reset();  // nobody waits for answers any more
  if (active_) Suspend();
}

ExpertWeights PrefetchRuntime::WeightsAt(std::byte* memory) const {
  const int64_t d = spec_.geometry.d_model, f = spec_.d_ff;
  const auto view = at::TensorOptions().dtype(options_.dtype).device(options_.device);
  return {at::from_blob(memory, {f, d}, view),
          at::from_blob(memory + spec_.blob_bytes() / 2, {d, f}, view)};
}

void PrefetchRuntime::Act() {
  const PlannerActions& actions = planner_.Poll();
  for (uint64_t id : actions.promote) engine_->Promote(id);
  for (uint64_t id : actions.cancel) engine_->Cancel(id);
  if (timeline_) {
    for (const TransferOrder& o : actions.start) watched_[o.id] = {o, clock_.Now()};
    for (const ExpertKey key : actions.evicted) {
      timeline_->Mark(Timeline::Track::kCache, "evict " + NameOf(key), clock_.Now());
    }
  }
  for (int slot : actions.retired) engine_->Discard(slot);
  for (int slot : actions.restored) engine_->Reclaim(slot);
  for (const TransferOrder& order : actions.start) engine_->Start(order);
  held_peak_ = std::max(held_peak_, cache_.held_slots());
}

void PrefetchRuntime::FitMemory(const PassInfo& pass) {
  if (options_.memory_bytes == 0) return;
  const uint64_t others = options_.key_value_bytes(pass), slot = spec_.stride_bytes();
  const uint64_t room =
      options_.memory_bytes > others ? (options_.memory_bytes - others) / slot : 0;
  if (room < 2) {
    throw std::logic_error(
        "PrefetchRuntime: keys and values leave no room for two slots");
  }
  std::unique_lock lock(mutex_);
  planner_.SetCapacity(static_cast<int>(
      std::min<uint64_t>(room, static_cast<uint64_t>(cache_.num_slots()))));
  Act();
  while (!planner_.within_capacity()) Wait(&lock);  // each arrival acts
  const int slots = cache_.num_slots() - cache_.retired_slots();
  least_slots_ = std::min(least_slots_, slots);
  memory_peak_ = std::max(memory_peak_, static_cast<uint64_t>(slots) * slot + others);
}

void PrefetchRuntime::OnDone(uint64_t id, TransferOutcome outcome, uint64_t bytes) {
  std::lock_guard lock(mutex_);
  const auto restored = std::find(restoring_.begin(), restoring_.end(), id);
  if (restored != restoring_.end()) {
    // A held expert that cannot be read again is an error of the disk; Resume reports it.
    restoring_.erase(restored);
    restore_failed_ = restore_failed_ || outcome != TransferOutcome::kArrived;
  } else {
    if (timeline_) WatchTransfer(id, outcome);
    planner_.OnDone(id, outcome, bytes);
    if (active_) Act();
  }
  arrived_.notify_all();
}

void PrefetchRuntime::SetTimeline(Timeline* timeline) {
  const std::lock_guard lock(mutex_);
  timeline_ = timeline;
  watched_.clear();
}

void PrefetchRuntime::WatchTransfer(uint64_t id, TransferOutcome outcome) {
  const auto found = watched_.find(id);
  if (found == watched_.end()) return;
  const auto& [order, started] = found->second;
  const char* how = outcome == TransferOutcome::kArrived     ? "arrived"
                    : outcome == TransferOutcome::kCancelled ? "cancelled"
                                                             : "failed";
  timeline_->Span(Timeline::Track::kLink, NameOf(order.key), started, clock_.Now(),
                  {{"for", order.demand ? "demand" : "speculation"}, {"outcome", how}});
  watched_.erase(found);
}

void PrefetchRuntime::OnPassBegin(const PassInfo& pass) {
  // Before a request's first pass there may be any pause.
  const bool goes_on = stack_ == Stack::kEncoder && pass.stack == Stack::kDecoder;
  const bool rested = pass.first_position == 0 && !goes_on;
  stack_ = pass.stack;
  pass_begin_ = clock_.Now();
  stall_ = predict_ = 0;
  {
    std::lock_guard lock(mutex_);
    planner_.BeginPass(rested);
    // Where speculation does not help the decoder, nothing is warmed for it either.
    planner_.SetWarming(!options_.planner.policy.auto_off ||
                        speculation_helps(Stack::kDecoder));
  }
  FitMemory(pass);
  if (!foresight_) return;
  runs_[static_cast<int>(stack_)] = true;
  // A window begins with its sequence.
  if (pass.first_position == 0) following_ = AnyGaugeNeedsPredictor();
  if (!Speculating()) {
    if (following_) {
      Tell([this, kept = Kept(pass)] { foresight_->SkipPass(kept); });
    }
    std::lock_guard lock(mutex_);
    ForgetPredictions();
    return;
  }
  const PassInfo kept = Kept(pass);
  Ask(
      "ask at the pass' begin", [this, kept] { return foresight_->AtPassBegin(kept); },
      [this, kept] { foresight_->SkipPass(kept); });
}

void PrefetchRuntime::OnRouting(const LayerRouting& routing) {
  // Kept until Begin: the demand goes first, the predictor runs while it is under way.
  pending_ = routing;
  has_pending_ = true;
  stats_[static_cast<int>(stack_)].requests += routing.expert_ids_BT.numel();
}

void PrefetchRuntime::Begin(int layer, std::span<const int> experts) {
  {
    std::lock_guard lock(mutex_);
    planner_.BeginLayer(layer, experts);
    Act();
  }
  visits_.push_back({layer, {experts.begin(), experts.end()}});
  if (!foresight_ || !has_pending_) return;
  has_pending_ = false;
  if (Speculating()) {
    const LayerRouting kept = Kept(pending_);
    Ask(
        "ask at a layer", [this, kept] { return foresight_->AtLayer(kept); },
        [this, kept] { foresight_->Skip(kept); });
  } else if (following_) {
    Tell([this, kept = Kept(pending_)] { foresight_->Skip(kept); });
  }
}

ExpertLease PrefetchRuntime::Next() {
  std::unique_lock lock(mutex_);
  std::optional<ExpertKey> key = planner_.TakeReady();
  if (!key) {
    const double from = clock_.Now();
    while (!(key = planner_.TakeReady())) {
      if (const auto failed = planner_.failed()) {
        throw EnvironmentError(
            ErrorText("expert " + std::to_string(failed->expert) + " of MoE layer " +
                          std::to_string(failed->layer) + " cannot be brought",
                      JoinedLines(engine_->last_error()),
                      "check the disk; remove the expert file to write it anew"));
      }
      Wait(&lock);
    }
    const double waited = clock_.Now() - from;
    stall_ += waited;
    planner_.AddStall(waited);
    if (timeline_) {
      timeline_->Span(Timeline::Track::kWaiting, "for " + NameOf(*key), from,
                      from + waited);
    }
  }
  const auto slot = static_cast<size_t>(cache_.slot(*key));
  return {key->expert,
          engine_->reads_in_place() ? WeightsAt(engine_->PlaceOf(*key)) : slots_[slot],
          [this, key, taken = clock_.Now()] { Release(*key, taken); }};
}

// With that many leased, each other slot is free, or under way to be, for the next one.
int PrefetchRuntime::LeasesAtOnce() {
  std::lock_guard lock(mutex_);
  return cache_.num_slots() - cache_.retired_slots();
}

void PrefetchRuntime::Release(ExpertKey key, double taken) {
  std::lock_guard lock(mutex_);
  if (timeline_) {
    timeline_->Span(Timeline::Track::kModel, NameOf(key), taken, clock_.Now());
  }
  planner_.Release(key);
  Act();
}

void PrefetchRuntime::OnPassEnd(const PassInfo& pass) {
  if (Speculating()) {
    Ask("ask at the pass' end",
        [this, kept = Kept(pass)] { return foresight_->AtPassEnd(kept); }, {});
  }
  const double seconds = clock_.Now() - pass_begin_;
  if (timeline_) {
    timeline_->Span(Timeline::Track::kModel, StackName(stack_), pass_begin_,
                    pass_begin_ + seconds);
  }
  double aside = 0;
  {
    std::lock_guard lock(mutex_);
    aside = std::exchange(aside_, 0);
  }
  if (foresight_ && options_.planner.policy.auto_off) {
    // What speculation changes, without the noise of computing: waiting, and asking, also
    // beside the model, whose cores may be all there are.
    gauges_[static_cast<int>(stack_)].Record(stall_ + predict_ + aside, following_,
                                             predict_ + aside);
  }
  PhaseStats& stats = stats_[static_cast<int>(stack_)];
  ++stats.passes;
  stats.pass_seconds += seconds;
  stats.stall_seconds += stall_;
  stats.predictor_seconds += predict_;
  stats.aside_seconds += aside;
  std::lock_guard lock(mutex_);
  const TransferLedger now = planner_.settled();
  const auto add = [](int64_t* to, uint64_t after, uint64_t before) {
    *to += static_cast<int64_t>(after) - static_cast<int64_t>(before);
  };
  add(&stats.uses, now.uses, last_ledger_.uses);
  add(&stats.hits, now.hits, last_ledger_.hits);
  add(&stats.bytes_useful, now.bytes_useful, last_ledger_.bytes_useful);
  add(&stats.bytes_late, now.bytes_late, last_ledger_.bytes_late);
  add(&stats.bytes_wasted, now.bytes_wasted, last_ledger_.bytes_wasted);
  add(&stats.speculations, now.speculations, last_ledger_.speculations);
  add(&stats.speculations_used, now.speculations_used, last_ledger_.speculations_used);
  add(&stats.speculations_in_time, now.speculations_in_time,
      last_ledger_.speculations_in_time);
  add(&stats.speculations_unused, now.speculations_unused,
      last_ledger_.speculations_unused);
  last_ledger_ = now;
}

PhaseStats PrefetchRuntime::stats(Stack stack) const {
  std::lock_guard lock(mutex_);
  PhaseStats stats = stats_[static_cast<int>(stack)];
  stats.bytes_wasted += static_cast<int64_t>(planner_.UnsettledBytes(stack));
  stats.speculations_unused += static_cast<int64_t>(planner_.Unsettled(stack));
  return stats;
}

std::vector<SpeculationAccount> PrefetchRuntime::speculation(Stack stack) const {
  std::lock_guard lock(mutex_);
  if (!options_.planner.policy.adapt_threshold) return {};
  return planner_.speculation().Accounts(stack);
}

std::optional<MemoryManagerState> PrefetchRuntime::memory_manager() const {
  std::lock_guard lock(mutex_);
  const MemoryManager* manager = planner_.memory_manager();
  return manager ? std::optional(manager->state()) : std::nullopt;
}

void PrefetchRuntime::ResetStats() {
  std::lock_guard lock(mutex_);
  planner_.ResetLedger();
  last_ledger_ = planner_.settled();
  stats_[0] = stats_[1] = {};
}

void PrefetchRuntime::Wait(std::unique_lock<std::mutex>* lock) {
  if (!engine_->is_stepped()) {
    arrived_.wait(*lock);
    return;
  }
  lock->unlock();
  engine_->Step();
  lock->lock();
}

void PrefetchRuntime::WaitIdle(std::unique_lock<std::mutex>* lock) {
  // Also after a failure: the engine must not report to a runtime that is gone.
  while (planner_.in_flight() != 0) Wait(lock);
}

void PrefetchRuntime::Suspend() {
  if (thread_) thread_->Drain();
  std::unique_lock lock(mutex_);
  active_ = false;
  ForgetPredictions();
  WaitIdle(&lock);
  has_pending_ = false;
}

void PrefetchRuntime::Resume() {
  engine_->SetDone([this](uint64_t id, TransferOutcome outcome, uint64_t bytes) {
    OnDone(id, outcome, bytes);
  });
  std::unique_lock lock(mutex_);
  for (int slot = 0; slot < cache_.num_slots(); ++slot) {
    if (options_.memory_bytes > 0) {  // the engine's last user may have left it otherwise
      cache_.IsRetired(slot) ? engine_->Discard(slot) : engine_->Reclaim(slot);
    }
    if (cache_.KeyIndexIn(slot) < 0) continue;
    restoring_.push_back(next_restore_);
    engine_->Start({next_restore_++,
                    ExpertKey::FromIndex(cache_.KeyIndexIn(slot), spec_.geometry), slot,
                    true});
  }
  while (!restoring_.empty()) Wait(&lock);
  if (restore_failed_) {
    throw EnvironmentError(ErrorText("held experts cannot be read again",
                                     JoinedLines(engine_->last_error()),
                                     "check the disk"));
  }
  active_ = true;
}

void PrefetchRuntime::Preload(const std::vector<ExpertKey>& keys) {
  {
    std::lock_guard lock(mutex_);
    for (ExpertKey key : keys) {
      if (cache_.state(key) != ExpertCache::State::kAbsent) continue;
      cache_.Load(key);
      cache_.Arrive(key);  // Resume below brings the bytes before anyone asks
      cache_.Touch(key);
    }
    held_peak_ = std::max(held_peak_, cache_.held_slots());
  }
  Resume();
}

int PrefetchRuntime::WarmStart(const UseShares& shares,
                               const std::vector<ExpertKey>& keys) {
  const std::vector<ExpertKey> most =
      MostUsed(shares, spec_.geometry, keys, static_cast<size_t>(cache_.num_slots()));
  {
    std::lock_guard lock(mutex_);
    cache_.SetPrior(shares.by_key);
  }
  Preload(most);
  return static_cast<int>(most.size());
}

double PrefetchRuntime::measured_link_bytes_per_second() const {
  std::lock_guard lock(mutex_);
  return static_cast<double>(spec_.blob_bytes()) / planner_.TransferSeconds();
}

std::vector<OracleForesight::Visit> PrefetchRuntime::TakeVisits() {
  return std::exchange(visits_, {});
}

std::byte* PrefetchRuntime::MemoryOf(ExpertKey key) {
  std::lock_guard lock(mutex_);
  const int slot = cache_.slot(key);
  if (slot < 0) return nullptr;
  return engine_->reads_in_place() ? engine_->PlaceOf(key) : engine_->slot(slot);
}

}  // namespace routecast
