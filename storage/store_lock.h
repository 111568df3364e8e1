// Exclusive use of a trace store by one job, on one host or on many (shared file system).
// The file `lock.json` names host, process, job and a heartbeat that a thread renews.
// Thread rule: one owner object; the heartbeat runs on a thread of its own.
#pragma once

#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

#include "common/files.h"

namespace routecast {

class StoreLock {
 public:
  // Takes the lock, or takes over that of a holder that is gone: on this host its process
  // no longer lives; on another host its heartbeat is older than two minutes, by the
  // clock of the file system. Throws EnvironmentError naming the holder otherwise.
  // `on_lost` is called (on the heartbeat's thread) with what to say where another job
  // has taken it over, because this one stood still for so long, or the lock is gone:
  // nothing may be written then.
  explicit StoreLock(const fs::path& store,
                     std::function<void(const std::string& error)> on_lost = {},
                     std::chrono::milliseconds heartbeat = std::chrono::seconds(15));
  ~StoreLock();  // releases, unless another job has taken it over
  StoreLock(const StoreLock&) = delete;
  StoreLock& operator=(const StoreLock&) = delete;
  // Names this job's files in staging/: unique among jobs.
  const std::string& token() const { return token_; }
  // EnvironmentError where the job `token` no longer holds the store's lock: between two
  // heartbeats another may have taken it over, and may have ended already. Any process.
  static void RequireHeld(const fs::path& store, const std::string& token);

 private:
  void Beat();
  bool IsOwn() const;
  fs::path path_;
  std::function<void(const std::string&)> on_lost_;
  std::chrono::milliseconds period_;
  std::string token_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool ending_ = false;
  std::thread heartbeat_;
};

// The job that holds the store's lock now, for people; empty: none, as far as this host's
// clock tells. Takes nothing.
std::string StoreHolder(const fs::path& store);

}  // namespace routecast
