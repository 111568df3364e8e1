#include "evaluator/link_engine.h"

#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <numeric>

#include "common/errors.h"
#include "common/foreign_text.h"
#include "common/stop.h"
#include "evaluator/clock.h"

namespace routecast {

double MeasurePeak(LinkEngine* engine, std::span<const ExpertKey> keys, int num_slots,
                   double seconds, size_t least) {
  constexpr int kUnderWay = 2;  // a link never waits for the next order
  std::mutex mutex;
  std::condition_variable arrived;
  int under_way = 0;
  // Orders end in any order: a slot is only asked for again when nobody looks at it.
  std::deque<int> free(static_cast<size_t>(num_slots));
  std::iota(free.begin(), free.end(), 0);
  std::map<uint64_t, int> taken;  // by order
  uint64_t bytes = 0;
  bool failed = false;
  engine->SetPace(0);
  engine->SetDone([&](uint64_t id, TransferOutcome outcome, uint64_t moved) {
    std::lock_guard lock(mutex);
    --under_way;
    free.push_back(taken.extract(id).mapped());
    bytes += moved;
    failed = failed || outcome == TransferOutcome::kFailed;
    arrived.notify_all();
  });
  const SteadyClock clock;
  const double start = clock.Now();
  std::unique_lock lock(mutex);
  const auto goes_on = [&](uint64_t i) {
    return (clock.Now() - start < seconds || i < least) && !failed && !StopRequested();
  };
  for (uint64_t i = 0; goes_on(i); ++i) {
    arrived.wait(lock, [&] { return under_way < kUnderWay && !free.empty(); });
    ++under_way;
    const int slot = free.front();
    free.pop_front();
    taken[i] = slot;
    lock.unlock();
    engine->Start({i, keys[i % keys.size()], slot, true});
    lock.lock();
  }
  arrived.wait(lock, [&] { return under_way == 0; });
  const double peak = static_cast<double>(bytes) / (clock.Now() - start);
  lock.unlock();
  engine->SetDone([](uint64_t, TransferOutcome, uint64_t) {});  // the last call is over
  ThrowIfStopped("while measuring the link");
  if (failed) {
    throw EnvironmentError(ErrorText("experts cannot be brought",
                                     JoinedLines(engine->last_error()),
                                     "check the disk; remove the expert file to write it "
                                     "anew"));
  }
  return peak;
}

}  // namespace routecast
