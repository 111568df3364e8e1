// What the planner speculates on: which transfers nobody asked for yet are started, and
// which are given up.
#include <algorithm>
#include <cmath>

#include "evaluator/prefetch_planner.h"

namespace routecast {
namespace {

// A visit farther ahead can still be started later, with better knowledge.
constexpr double kLeadDiscount = 0.6;
constexpr double kSwitchGain =
    1.5;  // how much better a speculation must be to replace one

// A warming gives way to whatever is foretold, unless less than this share is missing.
constexpr double kAlmostThere = 0.25;

}  // namespace

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

double PrefetchPlanner::MovedShare(const Flight& flight) const {
  const double began = std::max(flight.started, last_done_);
  return std::clamp((clock_->Now() - began) / transfer_seconds_, 0.0, 1.0);
}

// What was said at this lead is remembered, to be judged, and left out where it does not
// reach the threshold.
void PrefetchPlanner::ApplyThreshold(VisitForecast* forecast) {
  if (!options_.policy.adapt_threshold) return;
  std::erase_if(forecast->said,
                [&](const SaidExpert& said) { return said.lead == forecast->lead; });
  for (const ForetoldExpert& expert : forecast->ranked)
    forecast->said.push_back({forecast->lead, expert});
  const Stack stack = cache_->geometry().StackOf(forecast->layer);
  const double threshold = accounts_.Threshold(stack, forecast->lead);
  forecast->trusted = threshold <= 1;
  std::erase_if(forecast->ranked, [&](const ForetoldExpert& expert) {
    return expert.probability < threshold;
  });
}

void PrefetchPlanner::JudgeForecast(int layer, std::span<const int> experts) {
  const VisitForecast* forecast = forecasts_.Find(timeline_.visit());
  if (!forecast || forecast->layer != layer) return;
  const Stack stack = cache_->geometry().StackOf(layer);
  for (const auto& [lead, foretold] : forecast->said) {
    const bool came =
        std::find(experts.begin(), experts.end(), foretold.expert) != experts.end();
    accounts_.Judge(stack, lead, foretold.probability, came);
  }
}

bool PrefetchPlanner::Outdone(const Flight& flight) {
  const VisitForecast* forecast = forecasts_.Find(flight.visit);
  const bool foretold = forecast && forecast->layer == flight.order.key.layer;
  if (!foretold && !flight.warming) return false;
  const double left = std::clamp(
      1 - (clock_->Now() - std::max(flight.started, last_done_)) / transfer_seconds_,
      0.05, 1.0);
  if (!foretold && left < kAlmostThere) return false;
  const double own =
      foretold
          ? Score(forecast->ProbabilityOf(flight.order.key.expert), flight.visit) / left
          : 0;
  if (kSwitchGain * own >= 1) return false;  // no score is above 1
  LinkOutlook link;
  bool outdone = false;
  EachCandidate([&](const Candidate& candidate) {
    if (candidate.score <= kSwitchGain * own) return false;  // best first
    if (!link.known) link = OutlookOfLink();
    outdone = ArrivesInTime(candidate, link);
    return !outdone;
  });
  return outdone;
}

double PrefetchPlanner::Score(double probability, long visit) const {
  double score = probability;
  for (long v = timeline_.visit() + 1; v < visit; ++v) score *= kLeadDiscount;
  return score;
}

void PrefetchPlanner::Advance(Row* row) const {
  const VisitForecast& forecast = *row->forecast;
  for (; row->next < forecast.ranked.size(); ++row->next) {
    const ForetoldExpert& e = forecast.ranked[row->next];
    if (cache_->state({forecast.layer, e.expert}) != ExpertCache::State::kAbsent)
      continue;
    row->score = Score(e.probability, forecast.visit);
    return;
  }
  row->score = -1;
}

// Each visit's are ranked already: the best is that of one of the rows' heads.
template <typename Act>
void PrefetchPlanner::EachCandidate(const Act& act) {
  rows_.clear();
  for (int distance = 1; distance <= forecasts_.max_lead(); ++distance) {
    const VisitForecast* forecast = forecasts_.Find(timeline_.visit() + distance);
    if (!forecast || forecast->ranked.empty()) continue;
    rows_.push_back({forecast});
    Advance(&rows_.back());
    if (rows_.back().score < 0) rows_.pop_back();
  }
  while (!rows_.empty()) {
    Row* best = &rows_.front();
    for (Row& row : rows_) {
      if (row.score > best->score) best = &row;
    }
    if (best->score < 0) return;
    const VisitForecast& forecast = *best->forecast;
    const Candidate candidate{{forecast.layer, forecast.ranked[best->next].expert},
                              forecast.visit,
                              best->score,
                              forecast.lead};
    if (!act(candidate)) return;
    ++best->next;
    Advance(best);
  }
}

PrefetchPlanner::LinkOutlook PrefetchPlanner::OutlookOfLink() const {
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
  return {true, now, link_free, stall};
}

bool PrefetchPlanner::ArrivesInTime(const Candidate& candidate,
                                    const LinkOutlook& link) const {
  const int distance = static_cast<int>(candidate.visit - timeline_.visit());
  const double need = std::max(link.now, timeline_.StartOf(distance, link.stall));
  return link.free + transfer_seconds_ <=
         need + options_.late_allowance * transfer_seconds_;
}

bool PrefetchPlanner::MakeRoomFor(const Candidate& candidate) {
  if (cache_->free_slots() > 0) return true;
  const auto victim = PickVictim();
  if (!victim) return false;
  if (!cache_->Passed(victim->key.layer) && victim->worth >= Worth(candidate.key))
    return false;
  Evict(victim->key);
  displaced_[victim->key.Index(cache_->geometry())] = {StackOf(candidate.key),
                                                       candidate.lead, ledger_.uses};
  return true;
}

bool PrefetchPlanner::UnderPressure() const {
  const double limit = options_.policy.pressure_limit;
  if (limit >= 1) return false;
  // What is needed and what is leased are different experts; a demand is among the
  // needed.
  const auto speculated = std::count_if(
      flights_.begin(), flights_.end(),
      [](const Flight& flight) { return !flight.order.demand && !flight.joined; });
  const double spoken_for = static_cast<double>(unserved_.size()) + cache_->num_pinned() +
                            num_unused_ + static_cast<double>(speculated);
  return spoken_for + 1 > limit * capacity_;
}

void PrefetchPlanner::StartSpeculations(PlannerActions* actions) {
  if (!forecasts_.AnyAfter(timeline_.visit())) return;
  int speculating = 0;
  for (const Flight& flight : flights_) speculating += !flight.joined;
  // The last place is the demands'.
  const auto full = [&] {
    return speculating >= options_.max_in_flight - 1 ||
           in_flight() >= options_.max_in_flight || UnderPressure();
  };
  if (full()) return;
  LinkOutlook link;
  const size_t evicted_before = evicted_.size();
  EachCandidate([&](const Candidate& candidate) {
    // What has just left for a better one stays away.
    const bool left = std::find(evicted_.begin() + static_cast<long>(evicted_before),
                                evicted_.end(), candidate.key) != evicted_.end();
    if (left || cache_->state(candidate.key) != ExpertCache::State::kAbsent) return true;
    if (!link.known) link = OutlookOfLink();
    if (!ArrivesInTime(candidate, link) || !MakeRoomFor(candidate)) return true;
    actions->start.push_back(Launch(candidate.key, false, candidate.visit));
    flights_.back().lead = candidate.lead;
    link.known = false;
    ++speculating;
    return !full();
  });
}

std::optional<ExpertKey> PrefetchPlanner::LikeliestOfDecoder() const {
  const MoeGeometry& g = cache_->geometry();
  std::optional<ExpertKey> likeliest;
  // What chance alone gives.
  double most = static_cast<double>(g.experts_per_token) / g.num_experts;
  for (int i = g.encoder_layers * g.num_experts; i < g.num_keys(); ++i) {
    const ExpertKey key = ExpertKey::FromIndex(i, g);
    if (cache_->state(key) != ExpertCache::State::kAbsent) continue;
    const double share = cache_->UseShare(key);
    if (share < most || (likeliest && share == most)) continue;
    if (std::find(cold_.begin(), cold_.end(), key) != cold_.end()) continue;
    likeliest = key;
    most = share;
  }
  return likeliest;
}

void PrefetchPlanner::StartWarming(PlannerActions* actions) {
  const MoeGeometry& g = cache_->geometry();
  const int layer = timeline_.layer();
  if (cache_->eviction() != Eviction::kPhaseAware || !options_.policy.speculate ||
      !warms_ || layer < 0 || layer >= g.encoder_layers || g.decoder_layers == 0 ||
      UnderPressure())
    return;
  std::optional<ExpertKey> victim;
  if (cache_->free_slots() == 0) {
    victim = cache_->Victim(unserved_);
    if (!victim || !cache_->Passed(victim->layer)) return;
  }
  // Layers count in the order in which they run, the encoder's first.
  const long now = timeline_.visit();
  const bool known = timeline_.DistanceTo(g.encoder_layers).has_value();
  if (known &&
      !ArrivesInTime({{}, now + g.encoder_layers - layer, 0, 0}, OutlookOfLink()))
    return;
  const std::optional<ExpertKey> key = LikeliestOfDecoder();
  if (!key) return;
  if (victim) Evict(*victim);
  actions->start.push_back(Launch(*key, false, now + key->layer - layer));
  flights_.back().warming = true;
}

}  // namespace routecast
