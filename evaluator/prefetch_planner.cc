#include "evaluator/prefetch_planner.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "common/errors.h"
#include "common/wide_loops.h"

namespace routecast {
namespace {

constexpr double kLinkSmoothing =
    0.2;  // share of the newest transfer in the link's estimate
// A visit farther ahead can still be started later, with better knowledge.
constexpr double kLeadDiscount = 0.6;
constexpr double kSwitchGain =
    1.5;  // how much better a speculation must be to replace one

// Numbers outside [0, 1] to its nearest end, what is not finite to 0; how many are
// `least` or more.
ROUTECAST_WIDE int Clean(float* p, int count, float least) {
  constexpr float kMost = std::numeric_limits<float>::max();
  int enough = 0;
  for (int i = 0; i < count; ++i) {
    const float sound = p[i] <= kMost ? p[i] : 0.f;
    const float low = sound > 0.f ? sound : 0.f;
    p[i] = low < 1.f ? low : 1.f;
    enough += p[i] >= least;
  }
  return enough;
}

bool Contains(const std::vector<ExpertKey>& keys, ExpertKey key) {
  return std::find(keys.begin(), keys.end(), key) != keys.end();
}

}  // namespace

SpeculationPolicy ParsePolicy(const std::string& name) {
  // The settings of all but auto are published ones; docs/runtime.md.
  static const std::vector<SpeculationPolicy> kPolicies = {
      {"on_demand", false, 0, 0, 1.0, false, false},
      {"multi_look", true, 3, 5, 0.7, false, false},
      {"top_k", true, 3, 10, 0.5, false, false},
      {"intelligent", true, 3, 10, 0.3, true, false},
      {"confident", true, 4, 2, 0.7, false, false},
      {"auto", true, 4, 2, 0.25, false, true}};
  std::vector<std::string> names;
  for (const auto& policy : kPolicies) names.push_back(policy.name);
  return kPolicies[ParseChoice("--policy", name, names)];
}

PrefetchPlanner::PrefetchPlanner(PlannerOptions options, ExpertCache* cache,
                                 const Clock* clock)
    : options_(std::move(options)),
      cache_(cache),
      clock_(clock),
      timeline_(cache->geometry().num_layers()),
      worth_(cache, &timeline_, &forecasts_),
      unused_(cache->geometry().num_keys(), 0),
      capacity_(cache->num_slots()),
      top_k_(options_.policy.top_k) {
  if (cache->num_slots() < 2 || options_.max_in_flight < 2 ||
      options_.expert_bytes == 0) {
    throw std::logic_error(
        "PrefetchPlanner: two slots, two in flight, experts of some bytes");
  }
  transfer_seconds_ =
      static_cast<double>(options_.expert_bytes) / options_.link_bytes_per_second;
}

void PrefetchPlanner::BeginLayer(int layer, std::span<const int> experts) {
  if (!unserved_.empty())
    throw std::logic_error("PrefetchPlanner: last layer not served");
  timeline_.Begin(layer, clock_->Now(), stall_);
  stall_ = 0;
  cache_->BeginLayer(layer);
  forecasts_.erase(forecasts_.begin(), forecasts_.upper_bound(timeline_.visit()));
  worth_.Renew();
  for (int expert : experts) {
    const ExpertKey key{layer, expert};
    cache_->Use(key);
    ++ledger_.uses;
    unserved_.push_back(key);
    const bool ready = cache_->state(key) == ExpertCache::State::kReady;
    if (options_.policy.adapt_k) AdaptTopK(ready);
    if (ready) {
      ++ledger_.hits;
      if (unused_[key.Index(cache_->geometry())]) {
        unused_[key.Index(cache_->geometry())] = 0;
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
    } else if (!flight->cancelling) {
      flight->joined = true;
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

void PrefetchPlanner::Predict(int layer, int distance,
                              std::span<const float> probabilities) {
  if (distance > options_.policy.max_lead || !options_.policy.speculate) return;
  VisitForecast& forecast = forecasts_[timeline_.visit() + distance];
  worth_.Renew();
  forecast.layer = layer;
  forecast.probabilities.assign(probabilities.begin(), probabilities.end());
  // A predictor may say anything; numbers outside [0, 1] must not reach the arithmetic.
  float* p = forecast.probabilities.data();
  const int experts = static_cast<int>(probabilities.size());
  const auto least = static_cast<float>(options_.policy.min_probability);
  const int candidates = Clean(p, experts, least);
  forecast.ranked.clear();
  for (int e = 0; static_cast<int>(forecast.ranked.size()) < candidates; ++e) {
    if (p[e] >= least) forecast.ranked.push_back(e);
  }
  std::stable_sort(forecast.ranked.begin(), forecast.ranked.end(), [&](int a, int b) {
    return forecast.probabilities[a] > forecast.probabilities[b];
  });
  const auto k = static_cast<size_t>(std::lround(top_k_));
  if (forecast.ranked.size() > k) forecast.ranked.resize(k);
}

std::optional<ExpertKey> PrefetchPlanner::PickVictim() {
  const bool foresees = !forecasts_.empty() && cache_->eviction() != Eviction::kBelady;
  return foresees ? worth_.Least(unserved_) : cache_->Victim(unserved_);
}

void PrefetchPlanner::ForgetPredictions() {
  forecasts_.clear();
  worth_.Renew();
}

void PrefetchPlanner::Evict(ExpertKey key) {
  uint8_t& unused = unused_[key.Index(cache_->geometry())];
  if (unused) {
    ledger_.bytes_wasted += options_.expert_bytes;
    ++ledger_.speculations_unused;
  }
  unused = 0;
  cache_->Drop(key);
  evicted_.push_back(key);
}

TransferOrder PrefetchPlanner::Launch(ExpertKey key, bool demand, long visit) {
  const TransferOrder order{next_id_++, key, cache_->Load(key), demand};
  flights_.push_back({order, clock_->Now(), visit, demand, false});
  if (!demand) ++ledger_.speculations;
  return order;
}

void PrefetchPlanner::SetCapacity(int slots) {
  if (slots < 2 || slots > cache_->num_slots())
    throw std::logic_error("PrefetchPlanner: a capacity of two slots, or of too many");
  capacity_ = slots;
  worth_.SetSlots(slots);
}

// Two slots are always left, and not more than two transfers are under way: once nothing
// is leased, there is an expert to evict.
void PrefetchPlanner::FitCapacity(PlannerActions* actions) {
  while (!within_capacity()) {
    if (cache_->free_slots() == 0) {
      const std::optional<ExpertKey> victim = PickVictim();
      if (!victim) return;
      Evict(*victim);
    }
    actions->retired.push_back(cache_->Retire());
  }
  while (cache_->retired_slots() > cache_->num_slots() - capacity_) {
    actions->restored.push_back(cache_->Restore());
  }
}

PlannerActions PrefetchPlanner::Poll() {
  PlannerActions actions;
  actions.promote.swap(promotions_);
  FitCapacity(&actions);
  CancelWrong(&actions);
  StartDemands(&actions);
  if (demands_.empty()) StartSpeculations(&actions);
  actions.evicted.swap(evicted_);
  return actions;
}

void PrefetchPlanner::StartDemands(PlannerActions* actions) {
  while (!demands_.empty() && in_flight() < options_.max_in_flight) {
    if (cache_->free_slots() == 0) {
      const std::optional<ExpertKey> victim = PickVictim();
      if (!victim)
        return;  // every slot is leased or needed: a release or an arrival frees one
      Evict(*victim);
    }
    actions->start.push_back(Launch(demands_.front(), true, timeline_.visit()));
    demands_.erase(demands_.begin());
  }
}

void PrefetchPlanner::CancelWrong(PlannerActions* actions) {
  if (!options_.engine_can_cancel) return;
  for (Flight& flight : flights_) {
    if (flight.joined || flight.cancelling) continue;
    // Past: its layer has shown its routing, and this expert is not among it.
    if (flight.visit > timeline_.visit() && !Outdone(flight)) continue;
    flight.cancelling = true;
    actions->cancel.push_back(flight.order.id);
  }
}

bool PrefetchPlanner::Outdone(const Flight& flight) const {
  const auto forecast = forecasts_.find(flight.visit);
  if (forecast == forecasts_.end() || forecast->second.layer != flight.order.key.layer) {
    return false;
  }
  const double left = std::clamp(
      1 - (clock_->Now() - std::max(flight.started, last_done_)) / transfer_seconds_,
      0.05, 1.0);
  const double own =
      Score(forecast->second.probabilities[flight.order.key.expert], flight.visit) / left;
  for (const Candidate& candidate : Candidates()) {
    if (candidate.score <= kSwitchGain * own) return false;  // best first
    if (ArrivesInTime(candidate)) return true;
  }
  return false;
}

double PrefetchPlanner::Score(double probability, long visit) const {
  double score = probability;
  for (long v = timeline_.visit() + 1; v < visit; ++v) score *= kLeadDiscount;
  return score;
}

std::vector<PrefetchPlanner::Candidate> PrefetchPlanner::Candidates() const {
  std::vector<Candidate> candidates;
  for (const auto& [visit, forecast] : forecasts_) {
    for (int expert : forecast.ranked) {
      const ExpertKey key{forecast.layer, expert};
      if (cache_->state(key) != ExpertCache::State::kAbsent) continue;
      const double p = forecast.probabilities[expert];
      candidates.push_back({key, visit, p, Score(p, visit)});
    }
  }
  std::stable_sort(
      candidates.begin(), candidates.end(),
      [](const Candidate& a, const Candidate& b) { return a.score > b.score; });
  return candidates;
}

bool PrefetchPlanner::ArrivesInTime(const Candidate& candidate) const {
  const double now = clock_->Now();
  double link_free = now, served = now;  // served: demands are first on the link
  for (const Flight& flight : flights_) {
    const double began = std::max(flight.started, last_done_);
    const bool first =
        &flight == &flights_.front();  // the others have not had the link yet
    const double left = std::max(0.0, transfer_seconds_ - (first ? now - began : 0.0));
    link_free += left;
    if (flight.joined) served += left;
  }
  // While the model waits for its demands, what comes after them is needed later.
  double stall = stall_;
  if (served > now) stall = std::max(stall, served - timeline_.visit_start());
  const int distance = static_cast<int>(candidate.visit - timeline_.visit());
  const double need = std::max(now, timeline_.StartOf(distance, stall));
  return link_free + transfer_seconds_ <=
         need + options_.late_allowance * transfer_seconds_;
}

bool PrefetchPlanner::MakeRoomFor(const Candidate& candidate) {
  if (cache_->free_slots() > 0) return true;
  const std::optional<ExpertKey> victim = PickVictim();
  if (!victim || Worth(*victim) >= Worth(candidate.key)) return false;
  Evict(*victim);
  return true;
}

void PrefetchPlanner::StartSpeculations(PlannerActions* actions) {
  if (forecasts_.empty()) return;
  int speculating = 0;
  for (const Flight& flight : flights_) speculating += !flight.joined;
  // The last place is the demands'.
  if (speculating >= options_.max_in_flight - 1 || in_flight() >= options_.max_in_flight)
    return;
  for (const Candidate& candidate : Candidates()) {
    if (cache_->state(candidate.key) != ExpertCache::State::kAbsent) continue;
    if (!ArrivesInTime(candidate) || !MakeRoomFor(candidate)) continue;
    actions->start.push_back(Launch(candidate.key, false, candidate.visit));
    if (++speculating >= options_.max_in_flight - 1) return;
    if (in_flight() >= options_.max_in_flight) return;
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
  if (outcome == TransferOutcome::kArrived) {
    // The link is serial: a transfer had it from its start or the end of the one before.
    const double seconds = now - std::max(flight.started, last_done_);
    if (seconds > 0) transfer_seconds_ += kLinkSmoothing * (seconds - transfer_seconds_);
    cache_->Arrive(key);
    if (flight.order.demand) {
      ledger_.bytes_useful += bytes;
    } else if (flight.joined || Contains(unserved_, key)) {
      ++ledger_.speculations_used;
      ledger_.bytes_late += bytes;
    } else {
      unused_[key.Index(cache_->geometry())] = 1;
    }
  } else {
    cache_->Drop(key);
    ledger_.bytes_wasted += bytes;
    if (!flight.order.demand) ++ledger_.speculations_unused;
    const bool wanted = Contains(unserved_, key);
    if (outcome == TransferOutcome::kFailed && wanted) failed_ = key;
    if (outcome == TransferOutcome::kFailed) {  // not tried again until it is demanded
      for (auto& [visit, forecast] : forecasts_) {
        if (forecast.layer == key.layer) std::erase(forecast.ranked, key.expert);
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
}

void PrefetchPlanner::AdaptTopK(bool in_time) {
  // Steady at 95 % in time: +4 a miss and -4/19 a hit, within 1..E/2.
  top_k_ += in_time ? -4.0 / 19 : 4.0;
  top_k_ = std::clamp(top_k_, 1.0, std::max(1.0, cache_->geometry().num_experts / 2.0));
}

}  // namespace routecast
