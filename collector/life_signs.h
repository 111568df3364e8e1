// Signs that this process advances, for those who watch it from a thread of their own
// (rank_watch.h): the work gives one at each of its small steps, and while it waits for
// another rank, who then is the one that hangs. One count a process. Thread rule: any
// thread.
#pragma once

#include <atomic>
#include <cstdint>

namespace routecast {

inline std::atomic<uint64_t> life_signs{0};

inline void ShowLife() { life_signs.fetch_add(1, std::memory_order_relaxed); }
inline uint64_t LifeSigns() { return life_signs.load(std::memory_order_relaxed); }

}  // namespace routecast
