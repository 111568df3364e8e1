// Which experts lie in the host tier, the middle of a chain: slots of the disk engine's
// arena, least recently used first out, pinned while a copy reads them. Bookkeeping only.
// Thread rule: one thread at a time.
#pragma once

#include <cstdint>
#include <list>
#include <optional>
#include <vector>

namespace routecast {

class HostTier {
 public:
  // Keys 0..num_keys-1 (ExpertKey::Index).
  HostTier(int num_keys, int num_slots);
  enum class State : uint8_t { kAbsent, kReading, kReady };
  State state(int key) const { return entries_[static_cast<size_t>(key)].state; }
  int slot(int key) const { return entries_[static_cast<size_t>(key)].slot; }
  // Takes a slot for `key`, which is absent, and puts the least recently used unpinned
  // expert out for it: kReading and pinned. nullopt: every slot is pinned.
  std::optional<int> Read(int key);
  void Arrive(int key);  // kReading -> kReady; the pin stays
  void Drop(int key);    // a read that failed or was cancelled: absent, the slot is free
  void Pin(int key);     // REQUIRES kReady
  void Unpin(int key);
  int num_ready() const { return num_ready_; }

 private:
  struct Entry {
    State state = State::kAbsent;
    int slot = -1, pins = 0;
    std::list<int>::iterator place;  // in order_, where ready and unpinned
  };
  std::vector<Entry> entries_;
  std::vector<int> free_;
  std::list<int> order_;  // ready and unpinned keys, the least recently used first
  int num_ready_ = 0;
};

}  // namespace routecast
