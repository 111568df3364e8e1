// Which experts sit in which slot of the budget, and which one goes first when room is
// needed. Bookkeeping only: no memory, no threads, no clock but the order of calls.
// Thread rule: one thread at a time (its owner's lock).
#pragma once

#include <array>
#include <compare>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "common/routing.h"

namespace routecast {

// Who leaves first among ready, unpinned experts; ties by least recent use, then lower
// key.
enum class Eviction {
  kNone,        // nothing stays after its use: slots are mere buffers
  kLru,         // least recently used
  kLfu,         // fewest uses
  kLfru,        // fewest uses per layer visit since the last use (vLLM issue 37190)
  kLeastStale,  // unused at its layer's latest visit, then farthest layer (SpecMD,
                // 2602.03921)
  kPhaseAware,  // what Passed; then the stack that is not running; then least recently
                // used
  kBelady,      // farthest next use in a known future (offline only)
};
Eviction ParseEviction(const std::string& name);  // UsageError naming the nearest
const char* EvictionName(Eviction eviction);

class ExpertCache {
 public:
  enum class State : uint8_t { kAbsent, kLoading, kReady };

  // REQUIRES num_slots >= 1.
  ExpertCache(const MoeGeometry& geometry, int num_slots, Eviction eviction);

  State state(ExpertKey key) const { return Of(key).state; }
  int slot(ExpertKey key) const { return Of(key).slot; }  // -1 where absent
  int pins(ExpertKey key) const { return Of(key).pins; }
  int num_pinned() const { return num_pinned_; }
  int num_slots() const { return static_cast<int>(in_slot_.size()); }
  int free_slots() const { return static_cast<int>(free_.size()); }
  int retired_slots() const { return static_cast<int>(retired_.size()); }
  bool IsRetired(int slot) const;
  // Slots with an expert in them or on its way.
  int held_slots() const { return num_slots() - free_slots() - retired_slots(); }
  Eviction eviction() const { return eviction_; }
  const MoeGeometry& geometry() const { return geometry_; }
  // The key in a slot, -1 (as an index) where free.
  int KeyIndexIn(int slot) const { return in_slot_[slot]; }

  // The model starts `layer`; then Use for every expert that it asks for.
  void BeginLayer(int layer);
  void Use(ExpertKey key);
  // Absent -> loading, into a free slot, which is returned. REQUIRES absent, free_slots()
  // > 0.
  int Load(ExpertKey key);
  void Arrive(ExpertKey key);  // loading -> ready
  // As if it had been used last, without counting a use: the order of a warm start.
  void Touch(ExpertKey key);
  // Shares of their layers' uses, by key, that UseShare begins with: as much as so many
  // visits of each layer. REQUIRES a share a key.
  void SetPrior(std::vector<double> shares) { prior_ = std::move(shares); }
  // Loading or ready -> absent. REQUIRES no pins.
  void Drop(ExpertKey key);
  // Takes a free slot out of service, and puts the one back that was taken last; the
  // slot. REQUIRES free_slots() > 0, retired_slots() > 0.
  int Retire();
  int Restore();
  void Pin(ExpertKey key);  // REQUIRES not absent
  void Unpin(ExpertKey key);
  // Ready and without pins.
  bool Evictable(ExpertKey key) const {
    return Of(key).state == State::kReady && Of(key).pins == 0;
  }
  // The evictable key outside `kept` that the policy gives up first; nullopt where there
  // is none. A look at each layer's first, but for kLfru, whose order changes with every
  // visit: at each slot.
  std::optional<ExpertKey> Victim(std::span<const ExpertKey> kept = {}) const;
  // True where the policy gives up `a` before `b`.
  bool LeavesBefore(ExpertKey a, ExpertKey b) const;
  // kPhaseAware: an encoder's layer whose turn is over, or has come: nothing uses its
  // experts before the next sequence, but for what the running layer still waits for.
  bool Passed(int layer) const;
  // Share of its layer's visits so far that used the key; before the first one 0, or the
  // prior's.
  double UseShare(ExpertKey key) const;
  // Share of its layer's recent visits that used the key (decays over about 256 visits,
  // or 16 where tokens take several experts).
  double UseRate(ExpertKey key) const {
    const auto layer = static_cast<size_t>(key.layer);
    if (layer_visits_[layer] == 0) return 0;
    const Entry& entry = Of(key);
    // Divided by the weight that the visits so far can reach: unbiased from the first
    // visit on.
    return entry.rate * Decay(layer_visits_[layer] - entry.rate_at) /
           (1 - reach_[layer].decay);
  }
  struct Rank {
    double score = 0;  // the lower, the sooner it leaves
    uint64_t last_use = 0;
    int expert = 0;
    bool operator<(const Rank& other) const {
      if (score != other.score) return score < other.score;
      return last_use != other.last_use ? last_use < other.last_use
                                        : expert < other.expert;
    }
    bool operator==(const Rank&) const = default;
  };
  // The score in HeldByRate(layer) of an expert whose use rate is exp(log_rate) now,
  // to within a millionth.
  double ScoreOfRate(int layer, double log_rate) const;
  // The layer's ready experts by rising use rate, the pinned ones, which may stand where
  // they did before their last use, among them; until the next change.
  std::span<const Rank> HeldByRate(int layer) const {
    return Sorted(layer, &by_rate_, &Entry::by_rate);
  }

  // kBelady: the demand uses to come, in order. Each Use must follow it.
  void SetFuture(const std::vector<ExpertKey>& uses);

 private:
  // What is asked of an expert most often lies in one line of the processor's cache.
  struct alignas(64) Entry {
    State state = State::kAbsent;
    bool ordered = false;  // it has a place in the orders
    int slot = -1;
    int pins = 0;
    double rate = 0;  // decayed use rate at layer visit `rate_at`
    uint64_t rate_at = 0;
    uint64_t last_use = 0;     // count of uses at that time, 0 = never
    uint64_t last_visit = 0;   // visit of all layers at the last use
    uint64_t layer_visit = 0;  // visit of its own layer at the last use
    uint64_t uses = 0;
    double rate_rank = -std::numeric_limits<double>::infinity();  // of its ByRate
    Rank by_policy, by_rate;  // its place in the orders, where it has one
  };
  // A layer's ready experts, sorted; what nobody has asked for lately is not kept up, and
  // sorted anew when somebody does.
  struct Order {
    std::vector<Rank> ranks;
    bool kept = true;
    int changes = 0;  // since it was asked for last
  };
  const Entry& Of(ExpertKey key) const { return entries_[key.Index(geometry_)]; }
  Entry& Of(ExpertKey key) { return entries_[key.Index(geometry_)]; }
  // How use rates fade, by visits of their layer.
  struct Fading {
    explicit Fading(double visits);
    double keep, fall;  // of a rate and of its logarithm, a visit
    std::array<double, 512> powers, log_reach;
  };
  static const Fading& FadingOf(const MoeGeometry& geometry);
  double Decay(uint64_t visits) const {
    return visits < fading_.powers.size() ? fading_.powers[visits] : FarDecay(visits);
  }
  double FarDecay(uint64_t visits) const;
  double LogReach(uint64_t visits) const;
  std::span<const Rank> Sorted(int layer, std::vector<Order>* orders,
                               Rank Entry::*rank) const {
    Order& order = (*orders)[static_cast<size_t>(layer)];
    order.changes = 0;
    if (!order.kept) Sort(layer, rank, &order);
    return order.ranks;
  }
  void Sort(int layer, Rank Entry::*rank, Order* order) const;
  uint64_t NextUse(int key_index) const;
  Rank ByPolicy(ExpertKey key) const;
  Rank ByRate(ExpertKey key) const;
  // An evictable key takes its place in its layer's orders. It keeps it while it is
  // pinned, and leaves with its slot.
  void Enter(ExpertKey key);
  void Leave(ExpertKey key);
  static bool KeptUp(Order* order);  // counts a change
  int LayerDistance(int layer) const;
  int PhaseTurn(int layer) const;

  MoeGeometry geometry_;
  const Fading& fading_;
  Eviction eviction_;
  std::vector<Entry> entries_;  // by key index
  std::vector<int> in_slot_;    // slot -> key index, -1 free
  std::vector<int> free_, retired_;
  // By layer. Within a layer both orders stand still between an expert's own uses: its
  // policy's (kLfru has none), and that of rates, which all fall alike. Moving some
  // hundred bytes costs less than a tree's nodes. To ask for one may sort it.
  mutable std::vector<Order> by_policy_, by_rate_;
  int num_pinned_ = 0;
  int layer_ = -1;       // running now
  uint64_t visits_ = 0;  // of any layer
  std::vector<uint64_t> layer_visits_;
  struct Reach {  // of a layer's visits: what follows from their number alone
    double decay = 1, log = 0;
  };
  std::vector<Reach> reach_;
  std::vector<double> prior_;  // by key; empty: none
  uint64_t num_uses_ = 0;
  uint64_t future_position_ = 0;
  std::vector<std::vector<uint64_t>> future_;  // by key: positions of its uses
  std::vector<size_t> future_head_;            // by key: first position not yet passed
};

}  // namespace routecast
