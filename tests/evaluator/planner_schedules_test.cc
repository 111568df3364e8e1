// The planner under random schedules, against a slow reference.
#include <algorithm>
#include <limits>
#include <set>
#include <utility>
#include <vector>

#include "common/random.h"
#include "evaluator/prefetch_planner.h"
#include "evaluator/simulated_link.h"
#include "gtest/gtest.h"

namespace routecast {
namespace {

// What the planner was told and what it ordered, kept the slow way: lists of all
// transfers and uses. Knows no cache, no worth and no link; says what the planner's
// counts and the cache's states must be.
class SlowReference {
 public:
  explicit SlowReference(int slots) : slots_(slots) {}

  void Begin(int layer, const std::vector<int>& experts) {
    for (int expert : experts) {
      const std::pair key{layer, expert};
      wanted_.insert(key);
      ++counts.uses;
      Transfer* held = Holding(key);
      if (held && held->over) {
        ++counts.hits;
        if (!held->demand && !held->used) {
          ++counts.speculations_used;
          ++counts.speculations_in_time;
          counts.bytes_useful += kBytes;
        }
        held->used = true;
      } else if (held && !held->cancelled) {
        held->joined = true;
      }
    }
  }
  void Evicted(ExpertKey key) {
    const std::pair<int, int> k{key.layer, key.expert};
    Transfer* held = Holding(k);
    ASSERT_TRUE(held && held->over) << "evicted what is not there";
    ASSERT_EQ(wanted_.count(k), 0u) << "evicted what is needed";
    ASSERT_EQ(leased_.count(k), 0u) << "evicted what is leased";
    Gone(held);
  }
  void Started(const TransferOrder& order) {
    const std::pair<int, int> key{order.key.layer, order.key.expert};
    ASSERT_EQ(Holding(key), nullptr) << "one expert twice";
    ASSERT_EQ(order.demand, wanted_.count(key) > 0);
    if (!order.demand) {
      // A cancelled one is there until it has ended; what failed is not tried again.
      for (const auto& wanted : wanted_)
        ASSERT_TRUE(Holding(wanted) || failed_.count(wanted))
            << "a speculation while a demand waits";
      ASSERT_EQ(Speculations(), 0) << "the demands' place is taken";
    }
    transfers_.push_back({order.id, key, order.demand});
    std::set<int> in_use = {order.slot};
    for (Transfer& t : transfers_) {
      if (t.id != order.id && !t.gone) {
        ASSERT_TRUE(in_use.insert(t.slot).second) << "one slot twice";
      }
    }
    transfers_.back().slot = order.slot;
    ASSERT_LE(static_cast<int>(in_use.size()), slots_) << "above the budget";
  }
  void Cancelled(uint64_t id) { Of(id)->cancelled = true; }
  void Done(uint64_t id, TransferOutcome outcome, uint64_t bytes) {
    Transfer* t = Of(id);
    ASSERT_FALSE(t->over || t->gone) << "two ends of one transfer";
    const bool needed = wanted_.count(t->key) > 0;
    if (outcome != TransferOutcome::kArrived) {
      if (outcome == TransferOutcome::kFailed) failed_.insert(t->key);
      counts.bytes_wasted += bytes;
      counts.speculations_unused += !t->demand;
      t->gone = true;
      return;
    }
    t->over = true;
    if (t->demand) {
      counts.bytes_useful += bytes;
    } else if (needed || t->joined) {
      counts.bytes_late += bytes;
      ++counts.speculations_used;
    } else {
      return;  // not used yet
    }
    t->used = true;
  }
  void Leased(ExpertKey key) {
    const std::pair<int, int> k{key.layer, key.expert};
    Transfer* held = Holding(k);
    ASSERT_TRUE(held && held->over) << "a lease of what has not arrived";
    ASSERT_EQ(wanted_.erase(k), 1u) << "a lease of what nobody asked for";
    leased_.insert(k);
  }
  void Released(ExpertKey key) { leased_.erase({key.layer, key.expert}); }

  // Of all that is known; what has arrived and was not used counts as wasted.
  void ExpectCounts(const PrefetchPlanner& planner) const {
    TransferLedger all = counts;
    for (const Transfer& t : transfers_) {
      all.speculations += !t.demand;
      if (t.demand || t.gone || !t.over || t.used) continue;
      ++all.speculations_unused;
      all.bytes_wasted += kBytes;
    }
    const TransferLedger told = planner.ledger();
    ASSERT_EQ(told.uses, all.uses);
    ASSERT_EQ(told.hits, all.hits);
    ASSERT_EQ(told.bytes_useful, all.bytes_useful);
    ASSERT_EQ(told.bytes_late, all.bytes_late);
    ASSERT_EQ(told.bytes_wasted, all.bytes_wasted);
    ASSERT_EQ(told.speculations, all.speculations);
    ASSERT_EQ(told.speculations_used, all.speculations_used);
    ASSERT_EQ(told.speculations_in_time, all.speculations_in_time);
    ASSERT_EQ(told.speculations_unused, all.speculations_unused);
  }
  static constexpr uint64_t kBytes = 100;

 private:
  struct Transfer {
    uint64_t id = 0;
    std::pair<int, int> key;
    bool demand = false, joined = false, cancelled = false;
    bool over = false, used = false, gone = false;
    int slot = -1;
  };
  Transfer* Holding(std::pair<int, int> key) {
    for (Transfer& t : transfers_) {
      if (t.key == key && !t.gone) return &t;
    }
    return nullptr;
  }
  Transfer* Of(uint64_t id) {
    for (Transfer& t : transfers_) {
      if (t.id == id) return &t;
    }
    throw std::logic_error("unknown transfer");
  }
  // Under way, and nobody waits for them.
  int Speculations() const {
    return static_cast<int>(std::count_if(
        transfers_.begin(), transfers_.end(),
        [](const Transfer& t) { return !t.demand && !t.joined && !t.over && !t.gone; }));
  }
  void Gone(Transfer* t) {
    t->gone = true;
    if (t->demand || t->used) return;
    counts.bytes_wasted += kBytes;
    ++counts.speculations_unused;
  }
  int slots_;
  TransferLedger counts;
  std::vector<Transfer> transfers_;
  std::set<std::pair<int, int>> wanted_, leased_, failed_;
};

// One random schedule: random sizes, needs, predictions (nonsense among them), holding
// times, failing speculations. Everything that the rules forbid is checked on the way.
void RunSchedule(uint64_t seed) {
  uint64_t drawn = 0;
  const auto draw = [&](uint64_t range) { return ToRange(Mix(seed, ++drawn), range); };
  const MoeGeometry g{static_cast<int>(draw(2)), 1 + static_cast<int>(draw(2)),
                      2 + static_cast<int>(draw(4)), 1, 8};
  const bool can_cancel = draw(2);
  const auto eviction = static_cast<Eviction>(draw(6));
  const int slots = 2 + static_cast<int>(draw(3));
  ManualClock clock;
  ExpertCache cache(g, slots, eviction);
  SpeculationPolicy policy = {"eager", true, 4, 8, 0.01, false, false};
  policy.adapt_k = draw(2);
  policy.adapt_threshold = Mix(seed, 77) % 2 == 0;
  policy.in_band = Mix(seed, 78) % 4 == 0;
  policy.pressure_limit = Mix(seed, 79) % 4 == 0 ? 0.8 : 1;
  policy.memory_manager = Mix(seed, 80) % 8 == 0;
  policy.most_experts = 1 + static_cast<int>(Mix(seed, 81) % 6);
  PrefetchPlanner planner({100, 50.0 + static_cast<double>(draw(100)), 2,
                           static_cast<double>(draw(3)) / 2, can_cancel, policy},
                          &cache, &clock);
  SimulatedLink link({100, 20 + draw(100), 100, draw(2) * 0.1, can_cancel}, &clock);
  SlowReference slow(slots);
  std::set<uint64_t> demanded;
  const auto drive = [&] {
    const PlannerActions actions = planner.Poll();
    bool speculated = false;
    for (const ExpertKey key : actions.evicted) slow.Evicted(key);
    for (const TransferOrder& order : actions.start) {
      slow.Started(order);
      ASSERT_FALSE(order.demand && speculated) << "demand after speculation";
      speculated |= !order.demand;
      if (order.demand) demanded.insert(order.id);
      ASSERT_EQ(cache.slot(order.key), order.slot);
      ASSERT_FALSE(cache.IsRetired(order.slot))
          << "a transfer into a slot out of service";
      if (!order.demand && draw(20) == 0) link.FailOn(order.id);
    }
    ASSERT_LE(planner.in_flight(), 2);
    for (uint64_t id : actions.promote) link.Promote(id);
    for (uint64_t id : actions.cancel) {
      ASSERT_FALSE(demanded.count(id)) << "a demand was cancelled";
      slow.Cancelled(id);
      link.Cancel(id);
    }
    for (const TransferOrder& order : actions.start) link.Start(order);
  };
  link.SetDone([&](uint64_t id, TransferOutcome outcome, uint64_t bytes) {
    slow.Done(id, outcome, bytes);
    planner.OnDone(id, outcome, bytes);
    drive();
  });
  std::vector<ExpertKey> leases;
  const auto release = [&] {
    slow.Released(leases.back());
    planner.Release(leases.back());
    leases.pop_back();
  };
  uint64_t served = 0, asked = 0;
  const int visits = 3 + static_cast<int>(draw(5));
  for (int v = 0; v < visits; ++v) {
    const int layer = v % g.num_layers();
    std::vector<int> experts;
    for (int e = 0; e < g.num_experts; ++e) {
      if (draw(3) == 0) experts.push_back(e);
    }
    asked += experts.size();
    slow.Begin(layer, experts);
    planner.BeginLayer(layer, experts);
    drive();
    for (int lead = 1; lead <= static_cast<int>(draw(4)); ++lead) {
      std::vector<float> p(g.num_experts);
      for (float& x : p) x = static_cast<float>(draw(12)) / 10 - 0.1f;
      if (draw(10) == 0) p[0] = std::numeric_limits<float>::quiet_NaN();
      planner.Predict((layer + lead) % g.num_layers(), lead, p);
      drive();
    }
    while (!planner.AllServed()) {
      if (planner.failed()) return;  // the runtime gives up here, with an error
      if (const auto key = planner.TakeReady()) {
        slow.Leased(*key);
        leases.push_back(*key);
        ++served;
        if (draw(2)) continue;  // keeps it for a while
      } else if (link.NextEvent() >= 0) {
        link.AdvanceTo(link.NextEvent());
        continue;
      } else {
        ASSERT_FALSE(leases.empty())
            << "deadlock: nothing ready, nothing moving, no lease";
      }
      release();
      drive();
    }
    while (!leases.empty()) release();
    drive();
    if (draw(4) == 0) {  // other users of the memory take room, or give it back
      planner.SetCapacity(2 + static_cast<int>(draw(static_cast<uint64_t>(slots) - 1)));
      drive();
      while (!planner.within_capacity()) {
        ASSERT_GE(link.NextEvent(), 0) << "stuck above the capacity";
        link.AdvanceTo(link.NextEvent());
      }
    }
    link.AdvanceTo(clock.Now() + static_cast<double>(draw(30)) / 10);
  }
  ASSERT_EQ(served, asked);
  slow.ExpectCounts(planner);
  const TransferLedger ledger = planner.ledger();
  ASSERT_LE(ledger.hits, ledger.uses);
  ASSERT_LE(ledger.speculations_in_time, ledger.speculations_used);
  const uint64_t settled = ledger.speculations_used + ledger.speculations_unused;
  ASSERT_LE(settled, ledger.speculations);
  ASSERT_GE(settled + static_cast<uint64_t>(planner.in_flight()), ledger.speculations);
}

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr uint64_t kSchedules = 50'000;  // slower by an order of magnitude
#else
constexpr uint64_t kSchedules = 1'000'000;
#endif

TEST(PlannerSchedulesTest, RandomSchedulesKeepTheRules) {
  for (uint64_t seed = 0; seed < kSchedules; ++seed) {
    RunSchedule(seed);
    if (HasFatalFailure()) FAIL() << "seed " << seed;
  }
}

}  // namespace
}  // namespace routecast
