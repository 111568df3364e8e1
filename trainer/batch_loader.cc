#include "trainer/batch_loader.h"

#include <chrono>
#include <stdexcept>

namespace routecast {

BatchLoader::BatchLoader(int64_t first, int64_t end, Plan plan, Make make, size_t depth)
    : plan_(std::move(plan)), make_(std::move(make)), depth_(depth) {
  thread_ =
      std::jthread([this, first, end](std::stop_token stop) { Run(stop, first, end); });
}

BatchLoader::~BatchLoader() = default;  // the thread is asked to stop, and joined

void BatchLoader::Run(const std::stop_token& stop, int64_t first, int64_t end) {
  try {
    for (int64_t step = first; step < end && !stop.stop_requested(); ++step) {
      const std::vector<MicroBatch> mine = plan_(step);
      if (mine.empty() && !Put(stop, {std::nullopt, true})) return;
      for (size_t i = 0; i < mine.size(); ++i) {
        const auto start = std::chrono::steady_clock::now();
        LoadedBatch made{make_(mine[i]), i + 1 == mine.size()};
        const std::chrono::duration<double> took =
            std::chrono::steady_clock::now() - start;
        {
          const std::lock_guard lock(mutex_);
          seconds_ += took.count();
        }
        if (!Put(stop, std::move(made))) return;
      }
    }
  } catch (...) {
    const std::lock_guard lock(mutex_);
    error_ = std::current_exception();
  }
  const std::lock_guard lock(mutex_);
  ended_ = true;
  changed_.notify_all();
}

bool BatchLoader::Put(const std::stop_token& stop, LoadedBatch batch) {
  std::unique_lock lock(mutex_);
  if (!changed_.wait(lock, stop, [&] { return waiting_.size() < depth_; })) return false;
  waiting_.push_back(std::move(batch));
  changed_.notify_all();
  return true;
}

LoadedBatch BatchLoader::Next() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return !waiting_.empty() || ended_; });
  if (waiting_.empty()) {
    if (error_) std::rethrow_exception(error_);
    throw std::logic_error("no step is left to load batches for");
  }
  LoadedBatch next = std::move(waiting_.front());
  waiting_.pop_front();
  lock.unlock();  // on one core the loader may run at once
  changed_.notify_all();
  return next;
}

double BatchLoader::seconds() const {
  const std::lock_guard lock(mutex_);
  return seconds_;
}

}  // namespace routecast
