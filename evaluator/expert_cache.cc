#include "evaluator/expert_cache.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <utility>

#include "common/errors.h"

namespace routecast {
namespace {

// Long: what is used much in the long run says more than what was used just now
// (docs/results/runtime.md), and still a change of the workload is learned in time.
constexpr double kRateVisits = 256;
// Where tokens take several experts; chosen on one model's routing.
constexpr double kRateVisitsOfSets = 16;
constexpr double kPriorVisits = 64;  // that a prior counts as, a layer
const std::vector<std::string> kNames = {"none",        "lru",         "lfu",   "lfru",
                                         "least_stale", "phase_aware", "belady"};

constexpr int kUnasked = 64;  // changes of an order that nobody looks at

void Require(bool ok, const char* rule) {
  if (!ok) throw std::logic_error(std::string("ExpertCache: ") + rule);
}

using Ranks = std::vector<ExpertCache::Rank>;
void Insert(Ranks* ranks, const ExpertCache::Rank& rank) {
  if (ranks->empty() || ranks->back() < rank) {  // as the newest of LRU
    ranks->push_back(rank);
    return;
  }
  ranks->insert(std::lower_bound(ranks->begin(), ranks->end(), rank), rank);
}
void Erase(Ranks* ranks, const ExpertCache::Rank& rank) {
  ranks->erase(std::lower_bound(ranks->begin(), ranks->end(), rank));
}
// Those in between make room for it.
void Move(Ranks* ranks, const ExpertCache::Rank& from, const ExpertCache::Rank& to) {
  const auto old = std::lower_bound(ranks->begin(), ranks->end(), from);
  if (from < to) {
    const auto place =
        ranks->back() < to ? ranks->end() : std::lower_bound(old, ranks->end(), to);
    *std::move(old + 1, place, old) = to;
  } else {
    const auto place = std::lower_bound(ranks->begin(), old, to);
    std::move_backward(place, old, old + 1);
    *place = to;
  }
}

}  // namespace

ExpertCache::Fading::Fading(double visits)
    : keep(1.0 - 1.0 / visits), fall(-std::log(keep)) {
  for (size_t i = 0; i < powers.size(); ++i) {
    powers[i] = std::pow(keep, static_cast<int>(i));
    log_reach[i] = std::log(1 - powers[i]);
  }
}

const ExpertCache::Fading& ExpertCache::FadingOf(const MoeGeometry& geometry) {
  static const Fading kOne(kRateVisits), kSets(kRateVisitsOfSets);
  return geometry.experts_per_token > 1 ? kSets : kOne;
}

double ExpertCache::FarDecay(uint64_t visits) const {
  return std::exp(-fading_.fall * static_cast<double>(visits));
}

// The logarithm of the weight that a rate can have reached in `visits`.
double ExpertCache::LogReach(uint64_t visits) const {
  return visits < fading_.log_reach.size() ? fading_.log_reach[visits]
                                           : std::log1p(-Decay(visits));
}

Eviction ParseEviction(const std::string& name) {
  return static_cast<Eviction>(ParseChoice("--eviction", name, kNames));
}

const char* EvictionName(Eviction eviction) {
  return kNames[static_cast<size_t>(eviction)].c_str();
}

ExpertCache::ExpertCache(const MoeGeometry& geometry, int num_slots, Eviction eviction)
    : geometry_(geometry),
      fading_(FadingOf(geometry)),
      eviction_(eviction),
      entries_(geometry.num_keys()),
      in_slot_(std::max(num_slots, 0), -1),
      by_policy_(geometry.num_layers()),
      by_rate_(geometry.num_layers()),
      layer_visits_(geometry.num_layers(), 0),
      reach_(geometry.num_layers(), {Decay(0), LogReach(0)}) {
  Require(num_slots >= 1, "at least one slot");
  for (int slot = num_slots - 1; slot >= 0; --slot) free_.push_back(slot);
}

void ExpertCache::BeginLayer(int layer) {
  layer_ = layer;
  ++visits_;
  const uint64_t visits = ++layer_visits_[layer];
  reach_[static_cast<size_t>(layer)] = {Decay(visits), LogReach(visits)};
}

void ExpertCache::Use(ExpertKey key) {
  Entry& entry = Of(key);
  const uint64_t visit = layer_visits_[key.layer];
  entry.rate *= Decay(visit - entry.rate_at);
  entry.rate += 1 - fading_.keep;
  entry.rate_at = visit;
  // log(rate) at visit 0 of the layer, had it fallen since then as it will from now on.
  entry.rate_rank = std::log(entry.rate) + fading_.fall * static_cast<double>(visit);
  entry.last_use = ++num_uses_;
  entry.last_visit = visits_;
  entry.layer_visit = visit;
  ++entry.uses;
  if (!future_.empty()) {
    const int index = key.Index(geometry_);
    const auto& uses = future_[index];
    size_t& head = future_head_[index];
    Require(head < uses.size() && uses[head] == future_position_,
            "a use off the known future");
    ++head;
    ++future_position_;
  }
  if (Evictable(key)) Enter(key);
}

ExpertCache::Rank ExpertCache::ByPolicy(ExpertKey key) const {
  const Entry& entry = Of(key);
  double score = 0;  // least stale: who was not used at the layer's latest visit was
                     // used before those who were
  if (eviction_ == Eviction::kLfu) score = static_cast<double>(entry.uses);
  if (eviction_ == Eviction::kBelady)
    score = -static_cast<double>(NextUse(key.Index(geometry_)));
  return {score, entry.last_use, key.expert};
}

ExpertCache::Rank ExpertCache::ByRate(ExpertKey key) const {
  const Entry& entry = Of(key);
  return {entry.rate_rank, entry.last_use, key.expert};
}

void ExpertCache::Enter(ExpertKey key) {
  Entry& entry = Of(key);
  const Rank by_policy = ByPolicy(key), by_rate = ByRate(key);
  if (entry.ordered && entry.by_policy == by_policy && entry.by_rate == by_rate) return;
  const auto enter = [&](Order* order, Rank* at, const Rank& rank) {
    const Rank from = std::exchange(*at, rank);
    if (!KeptUp(order)) return;
    entry.ordered ? Move(&order->ranks, from, rank) : Insert(&order->ranks, rank);
  };
  const auto layer = static_cast<size_t>(key.layer);
  enter(&by_policy_[layer], &entry.by_policy, by_policy);
  enter(&by_rate_[layer], &entry.by_rate, by_rate);
  entry.ordered = true;
}

void ExpertCache::Leave(ExpertKey key) {
  Entry& entry = Of(key);
  if (!entry.ordered) return;
  const auto layer = static_cast<size_t>(key.layer);
  if (KeptUp(&by_policy_[layer])) Erase(&by_policy_[layer].ranks, entry.by_policy);
  if (KeptUp(&by_rate_[layer])) Erase(&by_rate_[layer].ranks, entry.by_rate);
  entry.ordered = false;
}

bool ExpertCache::KeptUp(Order* order) {
  order->kept = order->kept && ++order->changes <= kUnasked;
  return order->kept;
}

void ExpertCache::Sort(int layer, Rank Entry::*rank, Order* order) const {
  order->kept = true;
  order->ranks.clear();
  for (int expert = 0; expert < geometry_.num_experts; ++expert) {
    const Entry& entry = Of({layer, expert});
    if (entry.ordered) order->ranks.push_back(entry.*rank);
  }
  std::sort(order->ranks.begin(), order->ranks.end());
}

int ExpertCache::Load(ExpertKey key) {
  Entry& entry = Of(key);
  Require(entry.state == State::kAbsent && !free_.empty(),
          "Load of a present key or no slot");
  entry.state = State::kLoading;
  entry.slot = free_.back();
  free_.pop_back();
  in_slot_[entry.slot] = key.Index(geometry_);
  return entry.slot;
}

void ExpertCache::Arrive(ExpertKey key) {
  Require(Of(key).state == State::kLoading, "Arrive of a key that was not loading");
  Of(key).state = State::kReady;
  if (Evictable(key)) Enter(key);
}

void ExpertCache::Touch(ExpertKey key) {
  Of(key).last_use = ++num_uses_;
  if (Evictable(key)) Enter(key);
}

void ExpertCache::Drop(ExpertKey key) {
  Entry& entry = Of(key);
  Require(entry.state != State::kAbsent && entry.pins == 0,
          "Drop of a pinned or absent key");
  Leave(key);
  in_slot_[entry.slot] = -1;
  free_.push_back(entry.slot);
  entry.slot = -1;
  entry.state = State::kAbsent;
}

int ExpertCache::Retire() {
  Require(!free_.empty(), "Retire without a free slot");
  retired_.push_back(free_.back());
  free_.pop_back();
  return retired_.back();
}

int ExpertCache::Restore() {
  Require(!retired_.empty(), "Restore without a retired slot");
  free_.push_back(retired_.back());
  retired_.pop_back();
  return free_.back();
}

bool ExpertCache::IsRetired(int slot) const {
  return std::find(retired_.begin(), retired_.end(), slot) != retired_.end();
}

void ExpertCache::Pin(ExpertKey key) {
  Require(Of(key).state != State::kAbsent, "Pin of an absent key");
  if (Of(key).pins++ == 0) ++num_pinned_;
}

void ExpertCache::Unpin(ExpertKey key) {
  Require(Of(key).pins > 0, "Unpin without a pin");
  if (--Of(key).pins == 0) --num_pinned_;
  if (Evictable(key)) Enter(key);
}

std::optional<ExpertKey> ExpertCache::Victim(std::span<const ExpertKey> kept) const {
  std::optional<ExpertKey> victim;
  for (int layer = 0; layer < geometry_.num_layers(); ++layer) {
    for (const Rank& rank : Sorted(layer, &by_policy_, &Entry::by_policy)) {
      const ExpertKey key{layer, rank.expert};
      if (!Evictable(key)) continue;
      if (std::find(kept.begin(), kept.end(), key) != kept.end()) continue;
      if (!victim || LeavesBefore(key, *victim)) victim = key;
      if (eviction_ != Eviction::kLfru) break;
    }
  }
  return victim;
}

bool ExpertCache::LeavesBefore(ExpertKey a, ExpertKey b) const {
  const Entry& x = Of(a);
  const Entry& y = Of(b);
  // Larger score leaves first.
  double score_a = 0, score_b = 0;
  switch (eviction_) {
    case Eviction::kNone:
    case Eviction::kLru:
      break;
    case Eviction::kLfu:
      score_a = -static_cast<double>(x.uses);
      score_b = -static_cast<double>(y.uses);
      break;
    case Eviction::kLfru:
      score_a =
          -static_cast<double>(x.uses) / static_cast<double>(visits_ - x.last_visit + 1);
      score_b =
          -static_cast<double>(y.uses) / static_cast<double>(visits_ - y.last_visit + 1);
      break;
    case Eviction::kLeastStale: {
      const bool stale_a = x.layer_visit != layer_visits_[a.layer];
      const bool stale_b = y.layer_visit != layer_visits_[b.layer];
      if (stale_a != stale_b) return stale_a;
      score_a = LayerDistance(a.layer);
      score_b = LayerDistance(b.layer);
      break;
    }
    case Eviction::kPhaseAware: {
      score_a = PhaseTurn(a.layer);
      score_b = PhaseTurn(b.layer);
      break;
    }
    case Eviction::kBelady: {
      const uint64_t next_a = NextUse(a.Index(geometry_)),
                     next_b = NextUse(b.Index(geometry_));
      if (next_a != next_b) return next_a > next_b;
      break;
    }
  }
  if (score_a != score_b) return score_a > score_b;
  if (x.last_use != y.last_use) return x.last_use < y.last_use;
  return a < b;
}

bool ExpertCache::Passed(int layer) const {
  // Encoder layers count first: behind the running one, in whichever stack that is.
  return eviction_ == Eviction::kPhaseAware && layer <= layer_ &&
         geometry_.StackOf(layer) == Stack::kEncoder;
}

// The larger, the sooner it leaves.
int ExpertCache::PhaseTurn(int layer) const {
  if (Passed(layer)) return 2;
  return geometry_.StackOf(layer) != geometry_.StackOf(std::max(layer_, 0)) ? 1 : 0;
}

double ExpertCache::UseShare(ExpertKey key) const {
  auto visits = static_cast<double>(layer_visits_[static_cast<size_t>(key.layer)]);
  auto uses = static_cast<double>(Of(key).uses);
  if (!prior_.empty()) {
    visits += kPriorVisits;
    uses += kPriorVisits * prior_[static_cast<size_t>(key.Index(geometry_))];
  }
  return visits > 0 ? uses / visits : 0;
}

double ExpertCache::ScoreOfRate(int layer, double log_rate) const {
  const uint64_t visits = layer_visits_[static_cast<size_t>(layer)];
  return log_rate + reach_[static_cast<size_t>(layer)].log +
         fading_.fall * static_cast<double>(visits);
}

void ExpertCache::SetFuture(const std::vector<ExpertKey>& uses) {
  const auto evictable = [this](auto&& act) {
    for (int index : in_slot_) {
      if (index < 0) continue;
      const ExpertKey key = ExpertKey::FromIndex(index, geometry_);
      if (Evictable(key)) act(key);
    }
  };
  evictable([this](ExpertKey key) { Leave(key); });
  future_.assign(entries_.size(), {});
  future_head_.assign(entries_.size(), 0);
  future_position_ = 0;
  for (uint64_t i = 0; i < uses.size(); ++i)
    future_[uses[i].Index(geometry_)].push_back(i);
  evictable([this](ExpertKey key) { Enter(key); });
}

uint64_t ExpertCache::NextUse(int key_index) const {
  if (future_.empty()) return 0;
  const auto& uses = future_[key_index];
  const size_t head = future_head_[key_index];
  return head < uses.size() ? uses[head] : std::numeric_limits<uint64_t>::max();
}

int ExpertCache::LayerDistance(int layer) const {
  // Layers of a stack run in order, round and round; the layer that runs now comes last.
  const Stack stack = geometry_.StackOf(layer);
  if (layer_ < 0 || stack != geometry_.StackOf(layer_)) return geometry_.num_layers() + 1;
  const int distance = layer - layer_;
  return distance > 0 ? distance : distance + geometry_.layers(stack);
}

}  // namespace routecast
