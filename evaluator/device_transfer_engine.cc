#include "evaluator/device_transfer_engine.h"

#include <algorithm>
#include <utility>

#include "common/errors.h"
#include "evaluator/slot_arena.h"

namespace routecast {
namespace {
// By so much a late wake-up is caught up, of a job that was there for it. An idle link
// saves no time up.
constexpr double kPaceSlackSeconds = 200e-6;
}  // namespace

DeviceTransferEngine::DeviceTransferEngine(const ExpertFileSpec& spec,
                                           std::unique_ptr<DeviceCopy> device,
                                           std::unique_ptr<TransferEngine> host,
                                           std::byte* host_base, uint64_t host_bytes,
                                           int host_slots, int device_slots,
                                           DeviceEngineOptions options)
    : spec_(spec),
      options_(options),
      device_(std::move(device)),
      host_(std::move(host)),
      host_base_(host_base),
      device_name_(device_->description()),
      tier_(spec.geometry.num_keys(), host_slots) {
  if (options_.managed) {
    in_slot_.assign(static_cast<size_t>(device_slots), -1);
  } else {
    slab_ = device_->Allocate(static_cast<uint64_t>(device_slots) * spec_.stride_bytes());
    device_->Register(host_base, host_bytes);
  }
  host_->SetDone(
      [this](uint64_t id, TransferOutcome outcome, uint64_t) { OnRead(id, outcome); });
  thread_ = std::thread([this] { Work(); });
}

DeviceTransferEngine::~DeviceTransferEngine() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  thread_.join();
  // No copy reads host memory any more, unless the device is lost: then unpinning and
  // freeing would wait for it for ever, and the process is about to end with the error.
  if (lost_) {
    static auto* const kept = new std::vector<std::unique_ptr<DeviceCopy>>;
    kept->push_back(std::move(device_));
  } else if (!options_.managed) {
    try {
      device_->Unregister(host_base_);
    } catch (const std::exception&) {
      // The device broke after the last copy: whoever uses it next says why.
    }
  }
  host_.reset();
}

void DeviceTransferEngine::SetDone(Done done) {
  std::lock_guard one(done_mutex_);  // the last call may not have returned yet
  done_ = std::move(done);
}

void DeviceTransferEngine::Start(const TransferOrder& order) {
  {
    std::lock_guard lock(mutex_);
    Job job;
    job.order = order;
    job.key = order.key.Index(spec_.geometry);
    jobs_.push_back(job);
  }
  wake_.notify_all();
}

void DeviceTransferEngine::Promote(uint64_t id) {
  std::lock_guard lock(mutex_);
  Job* job = Find(id);
  if (!job) return;
  job->order.demand = true;
  if (job->phase == Phase::kReading) host_->Promote(id);
}

void DeviceTransferEngine::Cancel(uint64_t id) {
  {
    std::lock_guard lock(mutex_);
    Job* job = Find(id);
    if (!job) return;
    job->cancelled = true;
    if (job->phase == Phase::kReading) host_->Cancel(id);
  }
  wake_.notify_all();
}

std::string DeviceTransferEngine::description() const {
  std::lock_guard lock(mutex_);
  std::string text =
      device_name_ + (options_.managed ? ", prefetches of " : ", copies of ") +
      FormatBytes(options_.chunk_bytes) +
      (options_.managed ? " of managed memory" : " from pinned host memory");
  if (pace_ > 0) {
    text += ", paced to " + FormatBytes(static_cast<uint64_t>(pace_)) + "/s";
  }
  return text + ", filled by " + host_->description();
}

void DeviceTransferEngine::SetPace(double bytes_per_second) {
  {
    std::lock_guard lock(mutex_);
    pace_ = bytes_per_second;
    link_free_ = 0;
  }
  wake_.notify_all();
}

uint64_t DeviceTransferEngine::disk_bytes() const {
  std::lock_guard lock(mutex_);
  return disk_bytes_;
}

uint64_t DeviceTransferEngine::device_bytes_in_use() const {
  std::lock_guard lock(mutex_);
  return device_->MemoryBytes() - std::min(device_->FreeBytes(), device_->MemoryBytes());
}

std::string DeviceTransferEngine::last_error() const {
  std::lock_guard lock(mutex_);
  return error_.empty() ? host_->last_error() : error_;
}

DeviceTransferEngine::Job* DeviceTransferEngine::Find(uint64_t id) {
  const auto it = std::find_if(jobs_.begin(), jobs_.end(),
                               [&](const Job& job) { return job.order.id == id; });
  return it == jobs_.end() ? nullptr : &*it;
}

bool DeviceTransferEngine::BringToHost(Job* job) {
  if (job->phase != Phase::kNew || job->cancelled || job->failed) return false;
  if (tier_.state(job->key) == HostTier::State::kReady) {
    tier_.Pin(job->key);
    job->phase = Phase::kHeld;
    job->ready = device_->Now();
    return true;
  }
  // Being read for another job: that one's end is waited for.
  if (tier_.state(job->key) == HostTier::State::kReading) return false;
  const std::optional<int> slot = tier_.Read(job->key);
  if (!slot) return false;
  job->phase = Phase::kReading;
  TransferOrder read = job->order;
  read.slot = *slot;
  host_->Start(read);
  return true;
}

void DeviceTransferEngine::OnRead(uint64_t id, TransferOutcome outcome) {
  {
    std::lock_guard lock(mutex_);
    Job* job = Find(id);
    if (outcome == TransferOutcome::kArrived) {
      disk_bytes_ += spec_.blob_bytes();
      tier_.Arrive(job->key);  // worth keeping, also where the job was cancelled
      job->phase = Phase::kHeld;
      if (!lost_) job->ready = device_->Now();  // else it may be gone, with this engine
    } else {
      tier_.Drop(job->key);
      job->phase = Phase::kNew;
      (outcome == TransferOutcome::kFailed ? job->failed : job->cancelled) = true;
    }
  }
  wake_.notify_all();
}

bool DeviceTransferEngine::WaitsForPace() const {
  return pace_ > 0 && device_->Now() < link_free_;
}

bool DeviceTransferEngine::StartCopy() {
  if (static_cast<int>(copies_.size()) >= options_.max_copies) return false;
  if (WaitsForPace()) return false;
  Job* best = nullptr;
  for (Job& job : jobs_) {
    if (job.phase != Phase::kHeld || job.cancelled || job.failed) continue;
    if (job.handed == spec_.blob_bytes()) continue;
    if (!best || (job.order.demand && !best->order.demand)) best = &job;
  }
  if (!best) return false;
  if (best->handed == 0) {
    device_->FenceAfterCompute();
    if (options_.managed) Occupy(best->order.slot, best->key);
  }
  const uint64_t from = best->handed;
  const uint64_t bytes = std::min(options_.chunk_bytes, spec_.blob_bytes() - from);
  const std::byte* host = host_->slot(tier_.slot(best->key)) + from;
  const auto ticket =
      options_.managed
          ? device_->PrefetchAsync(host, SlotArena::SlotBytes(1, bytes), 0)
          : device_->CopyAsync(slot(best->order.slot) + from, host, bytes, 0);
  best->handed += bytes;
  ++best->copies;
  const double now = device_->Now();
  if (pace_ > 0) {
    link_free_ = std::max({link_free_, best->ready, now - kPaceSlackSeconds}) +
                 static_cast<double>(bytes) / pace_;
  }
  copies_.push_back({ticket, best->order.id, bytes, now, pace_ > 0 ? link_free_ : now});
  return true;
}

void DeviceTransferEngine::Vacate(int slot) {
  int& key = in_slot_[static_cast<size_t>(slot)];
  if (key >= 0)
    device_->DropPrefetched(host_->slot(tier_.slot(key)), spec_.stride_bytes());
  key = -1;
}

void DeviceTransferEngine::Occupy(int slot, int key) {
  if (in_slot_[static_cast<size_t>(slot)] == key) return;
  Vacate(slot);
  // Another user of this engine had it in another slot: it is there, and moves over.
  std::replace(in_slot_.begin(), in_slot_.end(), key, -1);
  in_slot_[static_cast<size_t>(slot)] = key;
}

std::byte* DeviceTransferEngine::PlaceOf(ExpertKey key) const {
  std::lock_guard lock(mutex_);
  return host_->slot(tier_.slot(key.Index(spec_.geometry)));
}

void DeviceTransferEngine::Discard(int slot) {
  if (!options_.managed) return;
  std::lock_guard lock(mutex_);
  Vacate(slot);
}

bool DeviceTransferEngine::FinishCopies() {
  bool changed = false;
  while (!copies_.empty() && device_->IsOver(copies_.front().ticket) &&
         device_->Now() >= copies_.front().carried) {
    Job* job = Find(copies_.front().job);
    job->finished += copies_.front().bytes;
    --job->copies;
    copies_.erase(copies_.begin());
    changed = true;
  }
  // One that is there and waits for its pace is as late as it should be.
  if (!copies_.empty() &&
      device_->Now() - copies_.front().started > options_.deadline_seconds &&
      !device_->IsOver(copies_.front().ticket)) {
    throw EnvironmentError(
        ErrorText("a copy to the device does not complete",
                  FormatBytes(copies_.front().bytes) + " under way for more than " +
                      std::to_string(static_cast<int>(options_.deadline_seconds)) + " s",
                  "nvidia-smi says what the device is doing; start the command again"));
  }
  return changed;
}

void DeviceTransferEngine::FailAll(const std::string& why) {
  lost_ = true;
  error_ = why;
  copies_.clear();
  for (Job& job : jobs_) {
    job.failed = true;
    job.copies = 0;
  }
}

void DeviceTransferEngine::Settle() {
  for (auto it = jobs_.begin(); it != jobs_.end();) {
    Job& job = *it;
    const bool whole = job.finished == spec_.blob_bytes();
    const bool ends = whole || job.cancelled || job.failed;
    // A read under way ends first: its slot is being written.
    if (!ends || job.copies > 0 || job.phase == Phase::kReading) {
      ++it;
      continue;
    }
    if (job.phase == Phase::kHeld) tier_.Unpin(job.key);
    TransferOutcome outcome =
        whole ? TransferOutcome::kArrived : TransferOutcome::kCancelled;
    if (job.failed && !whole) outcome = TransferOutcome::kFailed;
    over_.push_back({job.order.id, outcome, job.finished});
    it = jobs_.erase(it);
  }
}

void DeviceTransferEngine::Report(std::unique_lock<std::mutex>* lock) {
  const std::vector<Over> over = std::exchange(over_, {});
  lock->unlock();
  {
    std::lock_guard one(done_mutex_);
    for (const Over& o : over) done_(o.id, o.outcome, o.bytes);
  }
  lock->lock();
}

void DeviceTransferEngine::Work() {
  std::unique_lock lock(mutex_);
  while (true) {
    bool changed = false;
    try {
      if (lost_) {
        for (Job& job : jobs_) job.failed = true;
      } else if (!stopping_) {
        // Demands first, also for a place in host memory.
        for (const bool demand : {true, false}) {
          for (Job& job : jobs_) {
            if (job.order.demand == demand) changed = BringToHost(&job) || changed;
          }
        }
        while (StartCopy()) changed = true;
      }
      changed = FinishCopies() || changed;
    } catch (const std::exception& e) {
      FailAll(e.what());
      changed = true;
    }
    Settle();
    if (stopping_ && copies_.empty()) return;
    if (!over_.empty() && !stopping_) {
      Report(&lock);
      continue;
    }
    if (changed) continue;
    if (copies_.empty() && !WaitsForPace()) {
      wake_.wait(lock);
      continue;
    }
    lock.unlock();
    device_->Pause(options_.poll_seconds);
    lock.lock();
  }
}

}  // namespace routecast
