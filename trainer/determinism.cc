#include "trainer/determinism.h"

#include <ATen/Context.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>

namespace routecast {

void PinAlgorithms(bool pinned) {
  at::globalContext().setDeterministicAlgorithms(pinned, /*warn_only=*/false);
  at::globalContext().setDeterministicFillUninitializedMemory(false);
}

std::string CostOfPinning(const std::function<void()>& pass) {
  constexpr int kRounds = 3;
  std::array<double, 2> least = {1e30, 1e30};  // free, pinned
  for (int round = -1; round < kRounds; ++round) {
    for (const bool pinned : {false, true}) {
      PinAlgorithms(pinned);
      const auto start = std::chrono::steady_clock::now();
      pass();
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
      // The first round is for caches.
      if (round >= 0) least[pinned] = std::min(least[pinned], took.count());
    }
  }
  char line[160];
  std::snprintf(line, sizeof line,
                "deterministic: a micro-batch takes %.2fx the time it takes with any "
                "algorithm (%.1f and %.1f ms; --deterministic=false)",
                least[1] / least[0], 1e3 * least[1], 1e3 * least[0]);
  return line;
}

}  // namespace routecast
