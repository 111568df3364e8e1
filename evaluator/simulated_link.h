// A serial link of given rate and fixed cost under a manual clock: the engine of the
// planner's tests and of what-if runs. Moves no bytes. Demands overtake speculations
// between chunks. Thread rule: one thread; `done` runs inside AdvanceTo.
#pragma once

#include <set>
#include <vector>

#include "evaluator/transfer_engine.h"

namespace routecast {

struct SimulatedLinkOptions {
  uint64_t expert_bytes = 1 << 20;
  uint64_t chunk_bytes =
      1 << 18;  // a transfer can be overtaken or cancelled between chunks
  double bytes_per_second = 1e9;
  double fixed_seconds = 0;  // a transfer
  bool can_cancel = true;
};

class SimulatedLink : public TransferEngine {
 public:
  SimulatedLink(SimulatedLinkOptions options, ManualClock* clock)
      : options_(options), clock_(clock) {}
  void SetDone(Done done) override { done_ = std::move(done); }
  void Start(const TransferOrder& order) override;
  void Promote(uint64_t id) override;
  void Cancel(uint64_t id) override;
  bool can_cancel() const override { return options_.can_cancel; }
  std::byte* slot(int) const override { return nullptr; }
  std::string description() const override { return "simulated link"; }
  bool is_stepped() const override { return true; }
  void Step() override;  // std::logic_error on an idle link: nobody would ever wake up

  // Moves the clock to `time`, finishing what ends until then.
  void AdvanceTo(double time);
  // When the chunk under way ends; negative when the link is idle.
  double NextEvent() const { return busy_ ? chunk_end_ : -1; }
  // Fails the transfer of this order id when it would end (failure as input).
  void FailOn(uint64_t id) { failing_.insert(id); }

 private:
  struct Job {
    TransferOrder order;
    uint64_t moved = 0;
    bool cancelled = false;
  };
  void BeginChunk();
  void EndChunk();
  SimulatedLinkOptions options_;
  ManualClock* clock_;
  Done done_;
  std::vector<Job> jobs_;
  std::set<uint64_t> failing_;
  bool busy_ = false;
  uint64_t running_ = 0;  // id of the job whose chunk is under way
  uint64_t chunk_ = 0;    // its bytes
  double chunk_end_ = 0;
};

}  // namespace routecast
