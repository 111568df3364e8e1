// Compressed experts -> slots of whole ones: an inner engine brings blobs into a few
// staging slots, and each is decoded into its own slot as it arrives (so LOSSY rows read
// what any other row reads: plain weights). Thread rule: as TransferEngine.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "evaluator/slot_arena.h"
#include "evaluator/transfer_engine.h"

namespace routecast {

class DecodingEngine : public TransferEngine {
 public:
  using Decode = std::function<void(const std::byte* blob, std::byte* expert)>;
  // `inner` has at least num_staging slots, and belongs to this engine. slot_bytes: of a
  // decoded expert. `name` is for description(). REQUIRES num_staging >= 2.
  DecodingEngine(std::unique_ptr<TransferEngine> inner, int num_staging, int num_slots,
                 uint64_t slot_bytes, Decode decode, std::string name);
  ~DecodingEngine() override;

  void SetDone(Done done) override;
  void Start(const TransferOrder& order) override;
  void Promote(uint64_t id) override;
  void Cancel(uint64_t id) override;
  bool can_cancel() const override { return inner_->can_cancel(); }
  std::byte* slot(int slot) const override { return arena_.slot(slot); }
  void Discard(int slot) override { arena_.Discard(slot); }
  void Reclaim(int slot) override { arena_.Reclaim(slot); }
  std::string description() const override;
  std::string last_error() const override { return inner_->last_error(); }
  bool is_stepped() const override { return inner_->is_stepped(); }
  void Step() override { inner_->Step(); }

 private:
  void Feed();  // lock held: waiting orders into free staging slots, demands first
  void OnArrival(const Done& done, uint64_t id, TransferOutcome outcome, uint64_t bytes);

  SlotArena arena_;
  Decode decode_;
  std::string name_;
  std::mutex mutex_;
  struct Waiting {
    TransferOrder order;
    bool cancelled = false;
  };
  struct Flight {
    uint64_t id;
    int slot, staging;
  };
  std::deque<Waiting> waiting_;  // for a staging slot
  std::vector<Flight> flights_;
  std::vector<int> free_staging_;
  std::unique_ptr<TransferEngine> inner_;  // last: its threads end first
};

}  // namespace routecast
