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
  // `inner` has at least num_staging slots and belongs to this engine, as does `slots`,
  // the memory of decoded experts, where `decode` writes. `name` is for description().
  // REQUIRES num_staging >= 2.
  DecodingEngine(std::unique_ptr<TransferEngine> inner, int num_staging,
                 std::unique_ptr<SlotMemory> slots, Decode decode, std::string name);
  ~DecodingEngine() override;

  void SetDone(Done done) override;
  void Start(const TransferOrder& order) override;
  void Promote(uint64_t id) override;
  void Cancel(uint64_t id) override;
  bool can_cancel() const override { return inner_->can_cancel(); }
  std::byte* slot(int slot) const override { return slots_->slot(slot); }
  void Discard(int slot) override { slots_->Discard(slot); }
  void Reclaim(int slot) override { slots_->Reclaim(slot); }
  std::string description() const override;
  std::string last_error() const override;
  bool is_stepped() const override { return inner_->is_stepped(); }
  void Step() override { inner_->Step(); }

 private:
  void Feed();  // lock held: waiting orders into free staging slots, demands first
  void OnArrival(const Done& done, uint64_t id, TransferOutcome outcome, uint64_t bytes);

  std::unique_ptr<SlotMemory> slots_;
  Decode decode_;
  std::string name_;
  mutable std::mutex mutex_;
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
  std::string error_;                      // of decoding: a device may refuse
  std::unique_ptr<TransferEngine> inner_;  // last: its threads end first
};

}  // namespace routecast
