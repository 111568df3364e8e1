// A loop over independent items on a few threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace routecast {

// Runs f(i) for i in [0, n) on at most `threads` threads, this one included. Rethrows the
// exception of the smallest failing item that ran, so that errors repeat; items after a
// failure may be left out.
template <typename F>
void ParallelFor(size_t n, int threads, const F& f) {
  const size_t workers_wanted = static_cast<size_t>(std::max(threads, 1));
  const size_t grain = std::clamp<size_t>(n / (8 * workers_wanted), 1, 64);
  std::atomic<size_t> next{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  std::exception_ptr error;
  size_t error_at = n;
  const auto work = [&] {
    while (!failed) {
      const size_t first = next.fetch_add(grain);
      if (first >= n) return;
      for (size_t i = first; i < std::min(n, first + grain); ++i) {
        try {
          f(i);
        } catch (...) {
          const std::lock_guard<std::mutex> lock(mutex);
          failed = true;
          if (i < error_at) {
            error_at = i;
            error = std::current_exception();
          }
          break;
        }
      }
    }
  };
  const size_t wanted = std::min(workers_wanted, (n + grain - 1) / grain);
  std::vector<std::thread> workers;
  workers.reserve(wanted);
  try {
    for (size_t t = 1; t < wanted; ++t) workers.emplace_back(work);
  } catch (const std::system_error&) {  // no room for more: those that are there do it
  }
  work();
  for (std::thread& worker : workers) worker.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace routecast
