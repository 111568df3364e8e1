#include "evaluator/simulated_link.h"

#include <algorithm>
#include <stdexcept>

namespace routecast {

void SimulatedLink::Start(const TransferOrder& order) {
  jobs_.push_back({order});
  if (!busy_) BeginChunk();
}

void SimulatedLink::Promote(uint64_t id) {
  for (Job& job : jobs_) {
    if (job.order.id == id) job.order.demand = true;
  }
}

void SimulatedLink::Cancel(uint64_t id) {
  if (!options_.can_cancel) return;
  for (Job& job : jobs_) {
    if (job.order.id == id) job.cancelled = true;
  }
}

void SimulatedLink::BeginChunk() {
  busy_ = !jobs_.empty();
  if (!busy_) return;
  auto job = std::find_if(jobs_.begin(), jobs_.end(),
                          [](const Job& j) { return j.order.demand; });
  if (job == jobs_.end()) job = jobs_.begin();
  running_ = job->order.id;
  chunk_ = job->cancelled
               ? 0
               : std::min(options_.chunk_bytes, options_.expert_bytes - job->moved);
  chunk_end_ = clock_->Now() + (job->moved == 0 ? options_.fixed_seconds : 0) +
               static_cast<double>(chunk_) / options_.bytes_per_second;
}

void SimulatedLink::EndChunk() {
  const auto job = std::find_if(jobs_.begin(), jobs_.end(),
                                [&](const Job& j) { return j.order.id == running_; });
  job->moved += chunk_;
  busy_ = false;
  if (job->moved < options_.expert_bytes && !job->cancelled) {
    BeginChunk();
    return;
  }
  const Job finished = *job;
  jobs_.erase(job);
  TransferOutcome outcome = TransferOutcome::kArrived;
  if (finished.moved < options_.expert_bytes) outcome = TransferOutcome::kCancelled;
  if (failing_.count(finished.order.id)) outcome = TransferOutcome::kFailed;
  done_(finished.order.id, outcome, finished.moved);  // may start the next one itself
  if (!busy_) BeginChunk();
}

void SimulatedLink::Step() {
  if (!busy_) throw std::logic_error("the link is idle in a stall");
  AdvanceTo(chunk_end_);
}

void SimulatedLink::AdvanceTo(double time) {
  while (busy_ && chunk_end_ <= time) {
    clock_->AdvanceTo(chunk_end_);
    EndChunk();
  }
  clock_->AdvanceTo(time);
}

}  // namespace routecast
