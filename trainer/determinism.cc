#include "trainer/determinism.h"

#include <ATen/Context.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>

#include "common/stop.h"

namespace routecast {

void PinAlgorithms(bool pinned) {
  at::globalContext().setDeterministicAlgorithms(pinned, /*warn_only=*/false);
  at::globalContext().setDeterministicFillUninitializedMemory(false);
}

namespace {

constexpr double kLongSeconds = 1;   // a pass that is announced
constexpr double kMostSeconds = 20;  // then no further round is begun

double Timed(const std::function<void()>& pass) {
  const auto start = std::chrono::steady_clock::now();
  pass();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

std::string CostOfPinning(const std::function<void()>& pass) {
  constexpr int kRounds = 3;
  std::array<double, 2> least = {1e30, 1e30};  // free, pinned
  double spent = 0;
  for (int round = -1; round < kRounds && (round < 1 || spent < kMostSeconds); ++round) {
    for (const bool pinned : {false, true}) {
      PinAlgorithms(pinned);
      const double seconds = Timed(pass);
      if (spent == 0 && seconds > kLongSeconds) {
        std::fprintf(stderr,
                     "deterministic: timing micro-batches of about %.0f s with and "
                     "without, 4 to 8 of them; --deterministic=false does without\n",
                     seconds);
      }
      spent += seconds;
      // The first round is for caches.
      if (round >= 0) least[pinned] = std::min(least[pinned], seconds);
      if (StopRequested()) {
        PinAlgorithms(true);
        return "";
      }
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
