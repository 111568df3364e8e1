#include "evaluator/prefetch_planner.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

#include "common/errors.h"

namespace routecast {
namespace {

constexpr double kLinkSmoothing =
    0.2;  // share of the newest transfer in the link's estimate
// The published adaptive k: 95 % of the uses in time, two points to either side.
constexpr int kBandWindow = 100, kBandLow = 93, kBandHigh = 97;  // uses
constexpr double kLeastOfBand = 8;
constexpr int kMostLeads = 48;  // more would fill memory with recordings

bool Contains(const std::vector<ExpertKey>& keys, ExpertKey key) {
  return std::find(keys.begin(), keys.end(), key) != keys.end();
}

// The settings of all but auto are published ones; docs/runtime.md.
const std::vector<SpeculationPolicy>& Policies() {
  static const std::vector<SpeculationPolicy> kPolicies = [] {
    SpeculationPolicy banded{"adaptive_top_k", true, 3, 32, 0.01, true};
    banded.in_band = true;
    SpeculationPolicy intelligent{"intelligent", true, 3, 10, 0.3, true};
    intelligent.pressure_limit = 0.8;
    SpeculationPolicy managed{"memory_manager", true, 2, 0, 0.01};
    managed.memory_manager = true;
    return std::vector<SpeculationPolicy>{{"on_demand", false, 0, 0, 1.0, false, false},
                                          {"multi_look", true, 3, 5, 0.7, false, false},
                                          {"top_k", true, 3, 10, 0.5, false, false},
                                          banded,
                                          intelligent,
                                          {"confident", true, 4, 2, 0.7, false, false},
                                          managed,
                                          {"auto", true, 4, 4, 0.25, false, true, true}};
  }();
  return kPolicies;
}

}  // namespace

SpeculationPolicy ParsePolicy(const std::string& name) {
  std::vector<std::string> names;
  for (const auto& policy : Policies()) names.push_back(policy.name);
  return Policies()[static_cast<size_t>(ParseChoice("--policy", name, names))];
}

SpeculationPolicy PolicyFor(const std::string& name, const MoeGeometry& geometry) {
  SpeculationPolicy policy = ParsePolicy(name);
  if (policy.adapt_threshold && geometry.experts_per_token > 1) {
    const int turn = std::max(geometry.encoder_layers, geometry.decoder_layers);
    policy.max_lead = std::clamp(turn, policy.max_lead, kMostLeads);
  }
  return policy;
}

std::vector<std::string> ParsePolicies(const std::vector<std::string>& names) {
  std::vector<std::string> policies;
  std::vector<std::string> known = {"all"};
  for (const auto& policy : Policies()) known.push_back(policy.name);
  for (const std::string& name : names) {
    if (ParseChoice("--policy", name, known) == 0) {
      for (const auto& policy : Policies()) {
        if (policy.speculate) policies.push_back(policy.name);
      }
    } else {
      policies.push_back(name);
    }
  }
  std::vector<std::string> sorted = policies;
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  if (policies.empty() || twice != sorted.end()) {
    throw UsageError(ErrorText(
        policies.empty() ? "--policy names none" : "--policy names one twice: " + *twice,
        "", "use --policy=all, or a comma list"));
  }
  return policies;
}

PrefetchPlanner::PrefetchPlanner(PlannerOptions options, ExpertCache* cache,
                                 const Clock* clock)
    : options_(std::move(options)),
      cache_(cache),
      clock_(clock),
      timeline_(cache->geometry().num_layers()),
      forecasts_(options_.policy.max_lead),
      later_(cache),
      worth_(cache, &timeline_, &forecasts_, &later_),
      accounts_(options_.policy.max_lead, options_.policy.min_probability),
      unused_(cache->geometry().num_keys(), 0),
      displaced_(cache->geometry().num_keys()),
      capacity_(cache->num_slots()),
      top_k_(options_.policy.top_k) {
  if (cache->num_slots() < 2 || options_.max_in_flight < 2 ||
      options_.expert_bytes == 0) {
    throw std::logic_error(
        "PrefetchPlanner: two slots, two in flight, experts of some bytes");
  }
  transfer_seconds_ =
      static_cast<double>(options_.expert_bytes) / options_.link_bytes_per_second;
  const SpeculationPolicy& policy = options_.policy;
  if (policy.in_band) top_k_ = std::clamp(top_k_, LeastOfBand(), MostCandidatesEver());
  if (!policy.memory_manager) return;
  const int experts = cache->geometry().num_experts;
  manager_.emplace(experts, std::min(experts, policy.most_experts * choices()),
                   policy.aggressiveness);
  manager_->SetSlots(capacity_);
}

void PrefetchPlanner::BeginPass(bool rested) {
  timeline_.BeginPass(clock_->Now(), rested);
  link_use_.BeginPass(clock_->Now(), rested);
}

void PrefetchPlanner::BeginLayer(int layer, std::span<const int> experts) {
  if (!unserved_.empty())
    throw std::logic_error("PrefetchPlanner: last layer not served");
  const Stack stack = cache_->geometry().StackOf(layer);
  link_use_.BeginVisit(stack, clock_->Now());
  accounts_.SetLinkUse(stack, link_use_.Share(stack));
  timeline_.Begin(layer, clock_->Now(), stall_);
  stall_ = 0;
  cache_->BeginLayer(layer);
  later_.Begin(layer);
  worth_.Renew();
  JudgeForecast(layer, experts);
  for (int expert : experts) {
    const ExpertKey key{layer, expert};
    cache_->Use(key);
    ++ledger_.uses;
    unserved_.push_back(key);
    const bool ready = cache_->state(key) == ExpertCache::State::kReady;
    if (options_.policy.adapt_k) AdaptTopK(ready);
    if (ready) {
      ++ledger_.hits;
      if (const uint8_t unused = unused_[key.Index(cache_->geometry())]) {
        if (unused > 1) accounts_.Used(StackOf(key), unused - 1, 1);
        SetUnused(key, 0);
        ++ledger_.speculations_used;
        ++ledger_.speculations_in_time;
        ledger_.bytes_useful += options_.expert_bytes;
      }
      continue;
    }
    const auto flight = std::find_if(flights_.begin(), flights_.end(),
                                     [&](const Flight& f) { return f.order.key == key; });
    if (flight == flights_.end()) {
      demands_.push_back(key);
      const Displaced displaced =
          std::exchange(displaced_[key.Index(cache_->geometry())], {});
      const auto slots = static_cast<uint64_t>(cache_->num_slots());
      if (displaced.lead > 0 && ledger_.uses - displaced.uses <= slots)
        accounts_.Harmed(displaced.stack, displaced.lead, 1);
    } else if (!flight->cancelling) {
      flight->joined = true;
      flight->moved = MovedShare(*flight);
      promotions_.push_back(flight->order.id);
    }  // a cancelled one becomes a demand when its cancellation is confirmed
  }
}

std::optional<ExpertKey> PrefetchPlanner::TakeReady() {
  for (auto it = unserved_.begin(); it != unserved_.end(); ++it) {
    if (cache_->state(*it) != ExpertCache::State::kReady) continue;
    const ExpertKey key = *it;
    unserved_.erase(it);
    cache_->Pin(key);
    return key;
  }
  return std::nullopt;
}

void PrefetchPlanner::Release(ExpertKey key) {
  cache_->Unpin(key);
  if (cache_->eviction() == Eviction::kNone && cache_->Evictable(key)) Evict(key);
}

VisitForecast* PrefetchPlanner::Entry(int layer, int distance) {
  const SpeculationPolicy& policy = options_.policy;
  if (!policy.speculate || distance < 1 || distance > policy.max_lead) return nullptr;
  if (manager_ && distance > manager_->max_lead()) return nullptr;
  worth_.Renew();
  VisitForecast& forecast = forecasts_.Say(timeline_.visit() + distance);
  if (forecast.layer != layer) forecast.said.clear();
  forecast.layer = layer;
  forecast.lead = distance;
  return &forecast;
}

float PrefetchPlanner::LeastProbability(int layer) const {
  const SpeculationPolicy& policy = options_.policy;
  return static_cast<float>(
      policy.adapt_threshold
          ? accounts_.least_threshold(cache_->geometry().StackOf(layer))
          : policy.min_probability);
}

bool PrefetchPlanner::Foresee(VisitForecast* forecast, std::span<const float> p) const {
  forecast->probabilities = p;
  forecast->likeliest = {};
  std::vector<ForetoldExpert>& ranked = forecast->ranked;
  if (!RankExperts(p, LeastProbability(forecast->layer), &ranked)) return false;
  const size_t most = MostCandidates(ranked);
  if (ranked.size() > most) ranked.resize(most);
  return true;
}

size_t PrefetchPlanner::MostCandidates(std::span<const ForetoldExpert> ranked) const {
  if (!manager_) return static_cast<size_t>(std::lround(top_k_ * choices()));
  // How sure the visit's experts are: the mean of as many of the likeliest.
  const size_t taken = std::min(ranked.size(), static_cast<size_t>(choices()));
  double confidence = 0;
  for (const ForetoldExpert& expert : ranked.first(taken))
    confidence += expert.probability / choices();
  return static_cast<size_t>(manager_->PrefetchCount(confidence));
}

void PrefetchPlanner::Predict(int layer, int distance,
                              std::span<const float> probabilities) {
  VisitForecast* forecast = Entry(layer, distance);
  if (!forecast) return;
  std::vector<float>& kept = forecast->kept;
  kept.assign(probabilities.begin(), probabilities.end());
  if (!Foresee(forecast, kept)) {
    // A predictor may say anything; numbers outside [0, 1] must not reach the arithmetic.
    MakeProbabilities(&kept);
    Foresee(forecast, kept);
  }
  ApplyThreshold(forecast);
}

void PrefetchPlanner::PredictLater(int layer, std::span<const float> shares) {
  if (!options_.policy.speculate || !options_.policy.heed_later_use) return;
  later_.Say(layer, timeline_.visit(), shares);
  worth_.Renew();
}

void PrefetchPlanner::Predict(const RankedForecast& told) {
  if (told.distance == LayerForecast::kLater)
    return PredictLater(told.layer, told.probabilities);
  if (!told.sound) return Predict(told.layer, told.distance, told.probabilities);
  VisitForecast* forecast = Entry(told.layer, told.distance);
  if (!forecast) return;
  const float least = LeastProbability(told.layer);
  if (least < kRankedFrom) {
    Foresee(forecast, told.probabilities);
  } else {
    size_t count = 0;
    while (count < told.ranked.size() && told.ranked[count].probability >= least) ++count;
    count = std::min(count, MostCandidates(told.ranked.first(count)));
    forecast->probabilities = told.probabilities;
    forecast->likeliest = told.ranked;
    forecast->ranked.assign(told.ranked.begin(), told.ranked.begin() + count);
  }
  ApplyThreshold(forecast);
}

std::optional<ExpertWorth::Key> PrefetchPlanner::PickVictim() {
  const auto of_cache = [&]() -> std::optional<ExpertWorth::Key> {
    const std::optional<ExpertKey> key = cache_->Victim(unserved_);
    if (!key) return std::nullopt;
    return ExpertWorth::Key{*key, 0};
  };
  if (cache_->eviction() == Eviction::kPhaseAware) {
    const auto first = of_cache();
    if (first && cache_->Passed(first->key.layer)) return first;
  }
  const bool foresees =
      forecasts_.AnyAfter(timeline_.visit()) && cache_->eviction() != Eviction::kBelady;
  if (foresees) return worth_.Least(unserved_);
  auto victim = of_cache();
  if (victim && cache_->eviction() == Eviction::kBelady)
    victim->worth = Worth(victim->key);
  return victim;
}

void PrefetchPlanner::ForgetPredictions() {
  forecasts_.Forget();
  later_.Forget();
  worth_.Renew();
}

void PrefetchPlanner::Evict(ExpertKey key) {
  const uint8_t unused = unused_[key.Index(cache_->geometry())];
  if (unused) {
    ledger_.bytes_wasted += options_.expert_bytes;
    ++ledger_.speculations_unused;
    if (unused > 1) accounts_.Unused(StackOf(key), unused - 1, 1);
  }
  SetUnused(key, 0);
  cache_->Drop(key);
  evicted_.push_back(key);
}

void PrefetchPlanner::SetUnused(ExpertKey key, uint8_t value) {
  uint8_t& unused = unused_[key.Index(cache_->geometry())];
  num_unused_ += (value != 0) - (unused != 0);
  unused = value;
}

TransferOrder PrefetchPlanner::Launch(ExpertKey key, bool demand, long visit) {
  const TransferOrder order{next_id_++, key, cache_->Load(key), demand};
  const auto ahead = std::find_if(flights_.begin(), flights_.end(),
                                  [](const Flight& f) { return !f.joined; });
  const bool alone = std::none_of(flights_.begin(), flights_.end(),
                                  [](const Flight& f) { return f.joined; });
  Flight flight{order, clock_->Now(), visit, demand, false};
  if (demand && alone && ahead != flights_.end()) {
    flight.behind = ahead->order.key;
    flight.behind_lead = ahead->lead;
  }
  flights_.push_back(flight);
  displaced_[key.Index(cache_->geometry())] = {};
  if (!demand) ++ledger_.speculations;
  return order;
}

void PrefetchPlanner::SetCapacity(int slots) {
  if (slots < 2 || slots > cache_->num_slots())
    throw std::logic_error("PrefetchPlanner: a capacity of two slots, or of too many");
  capacity_ = slots;
  worth_.SetSlots(slots);
  if (manager_) manager_->SetSlots(slots);
}

// Two slots are always left, and not more than two transfers are under way: once nothing
// is leased, there is an expert to evict.
void PrefetchPlanner::FitCapacity(PlannerActions* actions) {
  while (!within_capacity()) {
    if (cache_->free_slots() == 0) {
      const auto victim = PickVictim();
      if (!victim) return;
      Evict(victim->key);
    }
    actions->retired.push_back(cache_->Retire());
  }
  while (cache_->retired_slots() > cache_->num_slots() - capacity_) {
    actions->restored.push_back(cache_->Restore());
  }
}

const PlannerActions& PrefetchPlanner::Poll() {
  PlannerActions& actions = actions_;
  for (auto* list : {&actions.promote, &actions.cancel}) list->clear();
  for (auto* list : {&actions.retired, &actions.restored}) list->clear();
  actions.start.clear();
  actions.evicted.clear();
  actions.promote.swap(promotions_);
  FitCapacity(&actions);
  CancelWrong(&actions);
  StartDemands(&actions);
  if (demands_.empty()) StartSpeculations(&actions);
  if (idle()) StartWarming(&actions);
  actions.evicted.swap(evicted_);
  return actions;
}

void PrefetchPlanner::StartDemands(PlannerActions* actions) {
  while (!demands_.empty() && in_flight() < options_.max_in_flight) {
    if (cache_->free_slots() == 0) {
      const auto victim = PickVictim();
      if (!victim)
        return;  // every slot is leased or needed: a release or an arrival frees one
      Evict(victim->key);
    }
    actions->start.push_back(Launch(demands_.front(), true, timeline_.visit()));
    demands_.erase(demands_.begin());
  }
}

void PrefetchPlanner::OnDone(uint64_t id, TransferOutcome outcome, uint64_t bytes) {
  const auto it = std::find_if(flights_.begin(), flights_.end(),
                               [&](const Flight& f) { return f.order.id == id; });
  if (it == flights_.end()) throw std::logic_error("PrefetchPlanner: unknown transfer");
  const Flight flight = *it;
  flights_.erase(it);
  const ExpertKey key = flight.order.key;
  const double now = clock_->Now();
  link_use_.Moved(std::max(flight.started, last_done_), now);
  if (outcome == TransferOutcome::kArrived) {
    // The link is serial: a transfer had it from its start or the end of the one before.
    const double seconds = now - std::max(flight.started, last_done_);
    if (seconds > 0) transfer_seconds_ += kLinkSmoothing * (seconds - transfer_seconds_);
    if (manager_) manager_->Loaded(seconds);
    if (flight.behind_lead > 0) {  // what it stood behind, in transfers
      const double late = (now - flight.started) / transfer_seconds_ - 1;
      accounts_.Harmed(StackOf(flight.behind), flight.behind_lead,
                       std::clamp(late, 0.0, 1.0));
    }
    cache_->Arrive(key);
    if (flight.order.demand) {
      ledger_.bytes_useful += bytes;
    } else if (flight.joined || Contains(unserved_, key)) {
      ++ledger_.speculations_used;
      ledger_.bytes_late += bytes;
      if (flight.lead > 0) accounts_.Used(StackOf(key), flight.lead, flight.moved);
    } else {
      SetUnused(key, static_cast<uint8_t>(1 + flight.lead));
    }
  } else {
    cache_->Drop(key);
    ledger_.bytes_wasted += bytes;
    if (!flight.order.demand) ++ledger_.speculations_unused;
    if (flight.lead > 0) {
      accounts_.Unused(
          StackOf(key), flight.lead,
          static_cast<double>(bytes) / static_cast<double>(options_.expert_bytes));
    }
    const bool wanted = Contains(unserved_, key);
    if (outcome == TransferOutcome::kFailed && wanted) failed_ = key;
    if (outcome == TransferOutcome::kFailed && flight.warming) cold_.push_back(key);
    if (outcome == TransferOutcome::kFailed) {  // not tried again until it is demanded
      for (int distance = 1; distance <= forecasts_.max_lead(); ++distance) {
        VisitForecast* forecast = forecasts_.Find(timeline_.visit() + distance);
        if (forecast && forecast->layer == key.layer)
          std::erase_if(forecast->ranked,
                        [&](const ForetoldExpert& e) { return e.expert == key.expert; });
      }
    }
    if (outcome == TransferOutcome::kCancelled && wanted) demands_.push_back(key);
  }
  last_done_ = now;
}

uint64_t PrefetchPlanner::Unsettled(Stack stack) const {
  const MoeGeometry& g = cache_->geometry();
  uint64_t count = 0;
  for (int key = 0; key < g.num_keys(); ++key) {
    const bool counts = g.StackOf(ExpertKey::FromIndex(key, g).layer) == stack;
    if (counts && unused_[static_cast<size_t>(key)]) ++count;
  }
  return count;
}

TransferLedger PrefetchPlanner::ledger() const {
  TransferLedger total = ledger_;
  for (Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
    total.bytes_wasted += UnsettledBytes(stack);
    total.speculations_unused += Unsettled(stack);
  }
  return total;
}

void PrefetchPlanner::ResetLedger() {
  ledger_ = {};
  std::fill(unused_.begin(), unused_.end(), 0);  // charged to the time before
  num_unused_ = 0;
}

double PrefetchPlanner::MostCandidatesEver() const {
  return std::max(1.0, cache_->geometry().num_experts / 2.0 / choices());
}

double PrefetchPlanner::LeastOfBand() const {
  return std::min(kLeastOfBand, MostCandidatesEver());
}

void PrefetchPlanner::AdaptTopK(bool in_time) {
  if (!options_.policy.in_band) {
    // Steady at 95 % in time: +4 a miss and -4/19 a hit, within 1..E/2.
    top_k_ += in_time ? -4.0 / 19 : 4.0;
    top_k_ = std::clamp(top_k_, 1.0, MostCandidatesEver());
    return;
  }
  window_in_time_ += in_time;
  if (++window_uses_ < kBandWindow) return;
  if (window_in_time_ < kBandLow) top_k_ += 4;
  if (window_in_time_ > kBandHigh) top_k_ -= 2;
  top_k_ = std::clamp(top_k_, LeastOfBand(), MostCandidatesEver());
  window_uses_ = window_in_time_ = 0;
}

}  // namespace routecast
