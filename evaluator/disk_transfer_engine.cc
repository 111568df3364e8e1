#include "evaluator/disk_transfer_engine.h"

#include <fcntl.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>

#include "common/errors.h"
#include "common/recorded_run.h"

namespace routecast {
namespace {
// By so much a late wake-up is caught up, of a job that was there for it. An idle link
// saves no time up.
constexpr double kPaceSlackSeconds = 200e-6;
constexpr uint64_t kPage = 4096;
constexpr int kLooks = 8;  // at a read, until it is overdue
}  // namespace

DiskTransferEngine::DiskTransferEngine(std::shared_ptr<const ExpertFile> file,
                                       int num_slots, DiskEngineOptions options)
    : file_(std::move(file)),
      options_(options),
      arena_(options_.memory
                 ? SlotArena(options_.memory, num_slots, file_->spec().stride_bytes())
                 : SlotArena(num_slots, file_->spec().stride_bytes())) {
  direct_ = options_.direct;
  fd_ = ::open(file_->path().c_str(), O_RDONLY | O_CLOEXEC | (direct_ ? O_DIRECT : 0));
  // Some file systems refuse at open, others at the first read.
  if (direct_ && fd_ >= 0 && ::pread(fd_, arena_.base(), 4096, 0) < 0 &&
      errno == EINVAL) {
    ::close(fd_);
    fd_ = -1;
    errno = EINVAL;
  }
  if (direct_ && fd_ < 0 && errno == EINVAL) {
    direct_ = false;
    std::fprintf(stderr,
                 "direct reads are refused for %s: reading through the page cache\n",
                 file_->path().c_str());
    fd_ = ::open(file_->path().c_str(), O_RDONLY | O_CLOEXEC);
  }
  if (fd_ < 0) ThrowErrno(errno, "open", file_->path());
  if (::fstat(fd_, &opened_) != 0) ThrowErrno(errno, "stat", file_->path());
  reads_.resize(static_cast<size_t>(options_.num_threads));
  for (Read& read : reads_) threads_.emplace_back([this, &read] { Work(&read); });
  watch_ = std::thread([this] { Watch(); });
}

DiskTransferEngine::~DiskTransferEngine() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  {
    std::lock_guard lock(mutex_);
    joined_ = true;
  }
  watch_wake_.notify_all();
  watch_.join();
  ::close(fd_);
}

void DiskTransferEngine::SetDone(Done done) {
  std::lock_guard one(done_mutex_);  // the last call may not have returned yet
  done_ = std::move(done);
}

void DiskTransferEngine::Start(const TransferOrder& order) {
  auto job = std::make_unique<Job>();
  job->order = order;
  job->offset = file_->Offset(order.key);
  job->ready = clock_.Now();
  {
    std::lock_guard lock(mutex_);
    jobs_.push_back(std::move(job));
  }
  wake_.notify_all();
}

void DiskTransferEngine::Promote(uint64_t id) {
  std::lock_guard lock(mutex_);
  for (auto& job : jobs_) {
    if (job->order.id == id) job->order.demand = true;
  }
}

void DiskTransferEngine::Cancel(uint64_t id) {
  {
    std::lock_guard lock(mutex_);
    for (auto& job : jobs_) {
      if (job->order.id == id) job->cancelled = true;
    }
  }
  wake_.notify_all();
}

void DiskTransferEngine::SetPace(double bytes_per_second) {
  std::lock_guard lock(mutex_);
  options_.pace_bytes_per_second = bytes_per_second;
  link_free_ = 0;
}

std::string DiskTransferEngine::description() const {
  std::lock_guard lock(mutex_);
  std::string text = std::string(direct_           ? "direct"
                                 : options_.direct ? "buffered (direct refused)"
                                                   : "buffered") +
                     " reads by " + std::to_string(options_.num_threads) + " threads, " +
                     (arena_.locked() ? "locked" : "unlocked") + " memory";
  if (options_.pace_bytes_per_second > 0) {
    text += ", paced to " +
            FormatBytes(static_cast<uint64_t>(options_.pace_bytes_per_second)) + "/s";
  }
  return text;
}

std::string DiskTransferEngine::last_error() const {
  std::lock_guard lock(mutex_);
  return error_;
}

DiskTransferEngine::Job* DiskTransferEngine::NextJob() {
  Job* best = nullptr;
  for (auto& job : jobs_) {
    if (job->cancelled && job->readers == 0) return job.get();  // only to be reported
    if (job->cancelled || job->failed) continue;
    if (job->handed == file_->spec().stride_bytes()) continue;
    if (!best || (job->order.demand && !best->order.demand)) best = job.get();
  }
  return best;
}

// Counts looks, not seconds: in a process that was stopped for a while none is overdue.
void DiskTransferEngine::Watch() {
  const std::chrono::duration<double> between(options_.deadline_seconds / kLooks);
  std::unique_lock lock(mutex_);
  while (!watch_wake_.wait_for(lock, between, [this] { return joined_; })) {
    for (Read& read : reads_) {
      if (!read.under_way || ++read.looks < kLooks) continue;
      std::fprintf(stderr,
                   "routecast-evaluate: reading experts does not come to an end: %s\n"
                   "  %llu bytes at %llu under way for %.0f s\n"
                   "  the disk hangs, or what it lies behind; start the command again "
                   "when it answers\n",
                   file_->path().c_str(), static_cast<unsigned long long>(read.size),
                   static_cast<unsigned long long>(read.offset),
                   options_.deadline_seconds);
      std::fflush(stderr);
      RecordAbruptEnd(kExitEnvironment);
      std::_Exit(kExitEnvironment);
    }
  }
}

void DiskTransferEngine::Work(Read* read) {
  // Waits for the pace end on time: 50 us late, as usual, are a third of a small
  // expert's.
  ::prctl(PR_SET_TIMERSLACK, 1);
  std::unique_lock lock(mutex_);
  while (true) {
    Job* job = NextJob();
    if (!job) {
      if (stopping_) return;
      wake_.wait(lock);
      continue;
    }
    if (job->cancelled) {
      FinishIfDone(job, &lock);
      continue;
    }
    const double now = clock_.Now();
    const double pace = options_.pace_bytes_per_second;
    if (pace > 0 && link_free_ > now) {
      wake_.wait_for(lock, std::chrono::duration<double>(link_free_ - now));
      continue;  // a demand may have come meanwhile
    }
    const uint64_t from = job->handed;
    const uint64_t size =
        std::min(options_.chunk_bytes, file_->spec().stride_bytes() - from);
    job->handed += size;
    ++job->readers;
    double carried = now;
    if (pace > 0) {
      link_free_ = std::max({link_free_, job->ready, now - kPaceSlackSeconds}) +
                   static_cast<double>(size) / pace;
      carried = link_free_;
    }
    std::byte* to = arena_.slot(job->order.slot) + from;
    *read = {true, 0, job->offset + from, size};
    lock.unlock();
    std::string error;
    try {
      ReadChunk(job->offset + from, size, to);
    } catch (const std::exception& e) {
      error = e.what();
    }
    lock.lock();
    read->under_way = false;
    // The chunk has crossed the emulated link only when its time is over.
    while (pace > 0 && clock_.Now() < carried && !stopping_) {
      wake_.wait_for(lock, std::chrono::duration<double>(carried - clock_.Now()));
    }
    --job->readers;
    job->finished += size;
    if (!error.empty()) {
      job->failed = true;
      error_ = error;
    }
    FinishIfDone(job, &lock);
  }
}

void DiskTransferEngine::ReadChunk(uint64_t offset, uint64_t size, std::byte* to) {
  uint64_t done = 0;
  while (done < size) {
    const ssize_t n =
        ::pread(fd_, to + done, size - done, static_cast<off_t>(offset + done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) ThrowErrno(errno, "read", file_->path());
    done += static_cast<uint64_t>(n);
    // A direct read stops within a page at a file's end alone, and is refused behind it.
    const bool ends = n == 0 || (direct_ && static_cast<uint64_t>(n) % kPage != 0);
    if (ends && done < size) {
      throw DataError(ErrorText("cut expert file: " + file_->path().string(),
                                "no byte at " + std::to_string(offset + done), ""));
    }
  }
}

void DiskTransferEngine::ExpectRight(const TransferOrder& order) const {
  struct stat now = {};
  if (::fstat(fd_, &now) != 0) ThrowErrno(errno, "stat", file_->path());
  // Somebody has written to the file: nothing that was right before need be so now.
  const bool changed = now.st_size != opened_.st_size ||
                       now.st_mtim.tv_sec != opened_.st_mtim.tv_sec ||
                       now.st_mtim.tv_nsec != opened_.st_mtim.tv_nsec;
  const std::byte* blob = arena_.slot(order.slot);
  if (changed || options_.check_hashes) {
    file_->Check(order.key, blob);
  } else {
    file_->CheckOnce(order.key, blob);
  }
}

void DiskTransferEngine::FinishIfDone(Job* job, std::unique_lock<std::mutex>* lock) {
  if (job->readers > 0) return;
  const bool whole = job->finished == file_->spec().stride_bytes();
  if (!whole && !job->cancelled && !job->failed) return;
  TransferOutcome outcome =
      whole ? TransferOutcome::kArrived : TransferOutcome::kCancelled;
  if (job->failed) outcome = TransferOutcome::kFailed;
  const auto it = std::find_if(jobs_.begin(), jobs_.end(),
                               [&](const auto& other) { return other.get() == job; });
  const std::unique_ptr<Job> finished = std::move(*it);
  jobs_.erase(it);
  lock->unlock();
  if (outcome == TransferOutcome::kArrived) {
    try {
      ExpectRight(finished->order);
    } catch (const std::exception& e) {
      outcome = TransferOutcome::kFailed;
      std::lock_guard error_lock(mutex_);
      error_ = e.what();
    }
  }
  {
    std::lock_guard one(done_mutex_);
    done_(finished->order.id, outcome,
          std::min(finished->finished, file_->spec().blob_bytes()));
  }
  lock->lock();
}

}  // namespace routecast
