#include "evaluator/host_tier.h"

namespace routecast {

HostTier::HostTier(int num_keys, int num_slots)
    : entries_(static_cast<size_t>(num_keys)) {
  for (int slot = num_slots - 1; slot >= 0; --slot) free_.push_back(slot);
}

std::optional<int> HostTier::Read(int key) {
  if (free_.empty()) {
    if (order_.empty()) return std::nullopt;
    Entry& out = entries_[static_cast<size_t>(order_.front())];
    order_.pop_front();
    free_.push_back(out.slot);
    out = {};
    --num_ready_;
  }
  Entry& entry = entries_[static_cast<size_t>(key)];
  entry.state = State::kReading;
  entry.slot = free_.back();
  entry.pins = 1;
  free_.pop_back();
  return entry.slot;
}

void HostTier::Arrive(int key) {
  entries_[static_cast<size_t>(key)].state = State::kReady;
  ++num_ready_;
}

void HostTier::Drop(int key) {
  Entry& entry = entries_[static_cast<size_t>(key)];
  free_.push_back(entry.slot);
  entry = {};
}

void HostTier::Pin(int key) {
  Entry& entry = entries_[static_cast<size_t>(key)];
  if (entry.pins++ == 0) order_.erase(entry.place);
}

void HostTier::Unpin(int key) {
  Entry& entry = entries_[static_cast<size_t>(key)];
  if (--entry.pins == 0) entry.place = order_.insert(order_.end(), key);
}

}  // namespace routecast
