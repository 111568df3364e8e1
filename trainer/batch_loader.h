// Makes the batches of a training's next steps on a thread of its own while the step
// before them runs. Which batches, and in which order, is the caller's: what is trained
// does not depend on how fast either thread is.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "trainer/speculation_batch.h"

namespace routecast {

struct LoadedBatch {
  std::optional<SpeculationBatch> batch;  // none: the step has none for this rank
  bool last = false;                      // of its step
};

// Thread rule: one thread calls Next and the destructor.
class BatchLoader {
 public:
  // Both are called on the loader's thread, one at a time. They may run no operation that
  // LibTorch runs in parallel: the thread would start a pool of its own beside the
  // training thread's, on the same cores.
  using Plan = std::function<std::vector<MicroBatch>(int64_t step)>;
  using Make = std::function<SpeculationBatch(const MicroBatch&)>;

  // Of steps first .. end - 1. At most `depth` batches wait, and one is being made.
  BatchLoader(int64_t first, int64_t end, Plan plan, Make make, size_t depth = 2);
  // Ends the thread as soon as the batch that it is making is made.
  ~BatchLoader();
  BatchLoader(const BatchLoader&) = delete;
  BatchLoader& operator=(const BatchLoader&) = delete;

  // The next batch, waiting for it where it has to. What `plan` or `make` threw is thrown
  // here, in the failed batch's place and from then on. std::logic_error after the last.
  LoadedBatch Next();
  // Seconds that the thread has worked so far.
  double seconds() const;

 private:
  void Run(const std::stop_token& stop, int64_t first, int64_t end);
  // False where it was asked to stop.
  bool Put(const std::stop_token& stop, LoadedBatch batch);

  const Plan plan_;
  const Make make_;
  const size_t depth_;
  mutable std::mutex mutex_;
  std::condition_variable_any changed_;
  std::deque<LoadedBatch> waiting_;
  std::exception_ptr error_;
  bool ended_ = false;
  double seconds_ = 0;
  std::jthread thread_;  // the last member: it uses the others
};

}  // namespace routecast
