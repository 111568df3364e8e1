// Disk -> host memory: a few threads read one expert in direct, aligned chunks into its
// slot of one locked arena. Between chunks a demand overtakes a speculation, and a
// speculation can be cancelled.
//
// The emulated link: with a pace (bytes a second) chunks are handed out no faster than a
// serial link of that rate would carry them. Reports label such runs `emulated`.
#pragma once

#include <sys/stat.h>

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "evaluator/clock.h"
#include "evaluator/expert_file.h"
#include "evaluator/link_engine.h"
#include "evaluator/slot_arena.h"

namespace routecast {

struct DiskEngineOptions {
  int num_threads = 3;               // readers; 2-4 saturate one disk
  uint64_t chunk_bytes = 1 << 20;    // multiple of 4096
  double pace_bytes_per_second = 0;  // 0 = as fast as the disk
  // Compares a blob with the file's index at every read (slow). Else at the first one,
  // and at every one of a file that changes.
  bool check_hashes = false;
  bool direct = true;           // false: through the page cache
  std::byte* memory = nullptr;  // of the slots, else an arena of the engine's own
  // A read that takes longer never ends. Nobody can call it back, nor free the memory
  // that it writes to: the process ends by name (exit 4). Above 0.
  double deadline_seconds = 45;
};

class DiskTransferEngine : public LinkEngine {
 public:
  // Opens the file for direct reads; falls back to buffered ones where the file system
  // refuses (direct() tells, description() says so). Slots hold one blob each.
  DiskTransferEngine(std::shared_ptr<const ExpertFile> file, int num_slots,
                     DiskEngineOptions options);
  ~DiskTransferEngine() override;

  void SetDone(Done done) override;  // while nothing is under way
  void Start(const TransferOrder& order) override;
  void Promote(uint64_t id) override;
  void Cancel(uint64_t id) override;
  bool can_cancel() const override { return true; }
  std::byte* slot(int slot) const override { return arena_.slot(slot); }
  void Discard(int slot) override { arena_.Discard(slot); }
  void Reclaim(int slot) override { arena_.Reclaim(slot); }
  std::string description() const override;
  std::string last_error() const override;

  bool direct() const { return direct_; }
  const SlotArena& arena() const { return arena_; }
  void SetPace(double bytes_per_second) override;

 private:
  struct Job {
    TransferOrder order;
    uint64_t offset = 0;    // of the blob in the file
    double ready = 0;       // since when the link could carry it
    uint64_t handed = 0;    // bytes given to readers
    uint64_t finished = 0;  // bytes in place
    int readers = 0;
    bool cancelled = false, failed = false;
  };
  // A reading thread's read, while it is under way: how often Watch has seen it.
  struct Read {
    bool under_way = false;
    int looks = 0;
    uint64_t offset = 0, size = 0;
  };
  void Work(Read* read);
  void Watch();
  Job* NextJob();  // lock held
  void ReadChunk(uint64_t offset, uint64_t size, std::byte* to);
  // Throws DataError where the expert is not what the file was written with: looked at
  // when it is read first, and always in a file that was changed since it was opened.
  void ExpectRight(const TransferOrder& order) const;
  void FinishIfDone(Job* job, std::unique_lock<std::mutex>* lock);

  std::shared_ptr<const ExpertFile> file_;
  DiskEngineOptions options_;
  SlotArena arena_;
  int fd_ = -1;
  struct stat opened_ = {};  // of the file, then
  bool direct_ = true;
  Done done_;
  SteadyClock clock_;
  mutable std::mutex mutex_;
  std::mutex done_mutex_;  // one `done` at a time
  std::condition_variable wake_;
  std::deque<std::unique_ptr<Job>> jobs_;
  double link_free_ = 0;  // when the paced link may take the next chunk
  bool stopping_ = false;
  std::string error_;
  std::vector<Read> reads_;  // by thread
  std::vector<std::thread> threads_;
  std::condition_variable watch_wake_;
  bool joined_ = false;  // the reading threads have ended
  std::thread watch_;
};

}  // namespace routecast
