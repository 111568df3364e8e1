// Carries transfers out: one expert's bytes into one slot. Disk to host memory
// (disk_transfer_engine.h), host to device (transfer_engine_cuda.h), or simulated.
#pragma once

#include <cstddef>
#include <functional>
#include <string>

#include "evaluator/prefetch_planner.h"

namespace routecast {

// Thread rule: Start, Promote and Cancel from any thread; they return at once and never
// call `done` themselves. `done` runs on a thread of the engine, one call at a time.
class TransferEngine {
 public:
  // `bytes` moved, also of a cancelled or failed transfer.
  using Done = std::function<void(uint64_t id, TransferOutcome outcome, uint64_t bytes)>;

  virtual ~TransferEngine() =
      default;  // waits for what is under way; no `done` afterwards
  virtual void SetDone(Done done) = 0;  // before the first Start
  // Demands go before speculations; equals in order.
  virtual void Start(const TransferOrder& order) = 0;
  virtual void Promote(uint64_t id) = 0;  // a speculation becomes a demand
  // Best effort: `done` follows in any case, with kCancelled or kArrived.
  virtual void Cancel(uint64_t id) = 0;
  virtual bool can_cancel() const = 0;
  // A slot's memory, where the model reads it; valid as long as the engine.
  virtual std::byte* slot(int slot) const = 0;
  // True where experts are read where they always lie, and a slot is only their right to
  // be near: PlaceOf(key), and no slot(), once the expert has arrived.
  virtual bool reads_in_place() const { return false; }
  virtual std::byte* PlaceOf(ExpertKey) const { return nullptr; }
  // A slot that nothing is under way to is not used for now: its memory may go back to
  // the system. Reclaim before the next Start into it. Engines whose memory is one piece
  // keep it.
  virtual void Discard(int) {}
  virtual void Reclaim(int) {}
  virtual std::string description() const = 0;  // for reports: path, mode, pace
  virtual std::string last_error() const { return ""; }
  // True where the engine has no threads and time stands still unless the waiting caller
  // calls Step (simulations, tests under a virtual clock).
  virtual bool is_stepped() const { return false; }
  // Moves on to the engine's next event, where `done` may be called. REQUIRES
  // is_stepped(), something under way, and no lock of the caller's that `done` takes.
  virtual void Step() {}
};

}  // namespace routecast
