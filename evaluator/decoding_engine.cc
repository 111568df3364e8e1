#include "evaluator/decoding_engine.h"

#include <algorithm>
#include <exception>

namespace routecast {

DecodingEngine::DecodingEngine(std::unique_ptr<TransferEngine> inner, int num_staging,
                               std::unique_ptr<SlotMemory> slots, Decode decode,
                               std::string name)
    : slots_(std::move(slots)),
      decode_(std::move(decode)),
      name_(std::move(name)),
      inner_(std::move(inner)) {
  for (int i = 0; i < num_staging; ++i) free_staging_.push_back(i);
}

DecodingEngine::~DecodingEngine() { inner_.reset(); }

void DecodingEngine::SetDone(Done done) {
  inner_->SetDone([this, done = std::move(done)](uint64_t id, TransferOutcome outcome,
                                                 uint64_t bytes) {
    OnArrival(done, id, outcome, bytes);
  });
}

void DecodingEngine::Start(const TransferOrder& order) {
  std::lock_guard lock(mutex_);
  waiting_.push_back({order});
  Feed();
}

void DecodingEngine::Promote(uint64_t id) {
  std::lock_guard lock(mutex_);
  for (Waiting& w : waiting_) {
    if (w.order.id == id) w.order.demand = true;
  }
  inner_->Promote(id);
}

void DecodingEngine::Cancel(uint64_t id) {
  std::lock_guard lock(mutex_);
  // Those that wait are reported by the next arrival: they wait only while there is one.
  for (Waiting& w : waiting_) {
    if (w.order.id == id) w.cancelled = true;
  }
  inner_->Cancel(id);
}

std::string DecodingEngine::description() const {
  return inner_->description() + ", " + name_;
}

std::string DecodingEngine::last_error() const {
  std::lock_guard lock(mutex_);
  return error_.empty() ? inner_->last_error() : error_;
}

void DecodingEngine::Feed() {
  while (!free_staging_.empty()) {
    auto best = waiting_.end();
    for (auto it = waiting_.begin(); it != waiting_.end(); ++it) {
      if (it->cancelled) continue;
      if (best == waiting_.end() || (it->order.demand && !best->order.demand)) best = it;
    }
    if (best == waiting_.end()) return;
    TransferOrder order = best->order;
    waiting_.erase(best);
    const int staging = free_staging_.back();
    free_staging_.pop_back();
    flights_.push_back({order.id, order.slot, staging});
    order.slot = staging;
    inner_->Start(order);
  }
}

void DecodingEngine::OnArrival(const Done& done, uint64_t id, TransferOutcome outcome,
                               uint64_t bytes) {
  std::vector<uint64_t> cancelled;
  Flight flight;
  {
    std::lock_guard lock(mutex_);
    flight = *std::find_if(flights_.begin(), flights_.end(),
                           [&](const Flight& f) { return f.id == id; });
  }
  // The staging slot is this flight's until it is freed below.
  std::string error;
  if (outcome == TransferOutcome::kArrived) {
    try {
      decode_(inner_->slot(flight.staging), slots_->slot(flight.slot));
    } catch (const std::exception& e) {
      outcome = TransferOutcome::kFailed;
      error = e.what();
    }
  }
  {
    std::lock_guard lock(mutex_);
    if (!error.empty()) error_ = error;
    std::erase_if(flights_, [&](const Flight& f) { return f.id == id; });
    free_staging_.push_back(flight.staging);
    Feed();
    for (const Waiting& w : waiting_) {
      if (w.cancelled) cancelled.push_back(w.order.id);
    }
    std::erase_if(waiting_, [](const Waiting& w) { return w.cancelled; });
  }
  done(id, outcome, bytes);
  for (uint64_t gone : cancelled) done(gone, TransferOutcome::kCancelled, 0);
}

}  // namespace routecast
