// Disk -> pinned host memory -> device slots, one expert after another, in two hops. The
// disk engine fills the slots of its arena (the host tier); a thread copies from there to
// the slots of one slab on the device, in chunks on a stream of its own, at most two
// under way, so that a demand overtakes a speculation between two chunks. What the host
// tier still holds needs no disk. A pace is that of the last hop.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "evaluator/device_copy.h"
#include "evaluator/expert_file.h"
#include "evaluator/host_tier.h"
#include "evaluator/link_engine.h"

namespace routecast {

struct DeviceEngineOptions {
  uint64_t chunk_bytes = 2 << 20;  // 90 % of a PCIe 4 link's peak from 1-2 MiB on
  int max_copies = 2;              // under way: a third could not be overtaken
  double deadline_seconds = 30;    // a copy that takes longer never completes
  double poll_seconds = 10e-6;     // between two looks at an event
  // The host's slots are managed memory of `device`, one for every expert: instead of a
  // copy to a slot of the device a prefetch of the expert where it lies, and what leaves
  // a slot is dropped from the device.
  bool managed = false;
};

class DeviceTransferEngine : public LinkEngine {
 public:
  // `host` has host_slots slots at `host_base` (host_bytes in all), which are pinned here
  // for as long as this engine lives. Throws what the device refuses.
  DeviceTransferEngine(const ExpertFileSpec& spec, std::unique_ptr<DeviceCopy> device,
                       std::unique_ptr<TransferEngine> host, std::byte* host_base,
                       uint64_t host_bytes, int host_slots, int device_slots,
                       DeviceEngineOptions options);
  ~DeviceTransferEngine() override;

  void SetDone(Done done) override;
  void Start(const TransferOrder& order) override;
  void Promote(uint64_t id) override;
  void Cancel(uint64_t id) override;
  bool can_cancel() const override { return true; }
  std::byte* slot(int slot) const override {
    return slab_ + static_cast<uint64_t>(slot) * spec_.stride_bytes();
  }
  bool reads_in_place() const override { return options_.managed; }
  std::byte* PlaceOf(ExpertKey key) const override;
  void Discard(int slot) override;  // of managed memory: it leaves the device
  std::string description() const override;
  std::string last_error() const override;
  void SetPace(double bytes_per_second) override;
  uint64_t disk_bytes() const override;
  uint64_t device_bytes_in_use() const override;

 private:
  enum class Phase { kNew, kReading, kHeld, kOver };
  struct Job {
    TransferOrder order;
    int key = 0;
    Phase phase = Phase::kNew;
    uint64_t handed = 0, finished = 0;  // bytes given to the device, and there
    double ready = 0;                   // since when host memory has held it
    int copies = 0;                     // under way
    bool cancelled = false, failed = false;
  };
  struct Copy {
    DeviceCopy::Ticket ticket;
    uint64_t job, bytes;
    double started, carried;  // carried: not over before, on a paced link
  };
  // All with the lock held, on the copying thread, unless said otherwise.
  void Work();
  bool BringToHost(Job* job);  // true where something changed
  bool StartCopy();
  void Occupy(int slot, int key);  // managed: `key` takes the place of who is there
  void Vacate(int slot);
  bool WaitsForPace() const;
  bool FinishCopies();
  void FailAll(const std::string& why);               // the device is lost
  void Settle();                                      // jobs that are over go to over_
  void Report(std::unique_lock<std::mutex>* lock);    // unlocks for `done`
  void OnRead(uint64_t id, TransferOutcome outcome);  // a thread of the host engine
  Job* Find(uint64_t id);

  ExpertFileSpec spec_;
  DeviceEngineOptions options_;
  std::unique_ptr<DeviceCopy> device_;
  std::unique_ptr<TransferEngine> host_;
  std::byte* host_base_;
  std::byte* slab_ = nullptr;
  std::string device_name_;
  mutable std::mutex mutex_;
  std::mutex done_mutex_;  // one `done` at a time
  std::condition_variable wake_;
  Done done_;
  HostTier tier_;
  std::vector<int> in_slot_;  // managed: the key whose slot it is, -1: nobody's
  std::deque<Job> jobs_;
  std::vector<Copy> copies_;
  struct Over {
    uint64_t id;
    TransferOutcome outcome;
    uint64_t bytes;
  };
  std::vector<Over> over_;
  double pace_ = 0, link_free_ = 0;  // when the paced link may take the next chunk
  uint64_t disk_bytes_ = 0;
  std::string error_;
  bool stopping_ = false, lost_ = false;
  std::thread thread_;
};

}  // namespace routecast
