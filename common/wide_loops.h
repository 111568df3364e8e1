// Loops that are as wide as the vectors of the machine they run on, in one binary.
// ROUTECAST_WIDE before a function lets the compiler make it once a width; HasAvx2
// chooses among loops that were written by hand. Thread rule: any thread.
#pragma once

// Sanitizers cannot run the resolvers that this needs.
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define ROUTECAST_WIDE \
  __attribute__((target_clones("avx512f", "avx2", "default"), optimize("O3")))
#else
#define ROUTECAST_WIDE
#endif

namespace routecast {

// Whether loops that are written for AVX2 can run here.
#if defined(__x86_64__)
inline bool HasAvx2() {
  static const bool has = __builtin_cpu_supports("avx2");
  return has;
}
#else
inline bool HasAvx2() { return false; }
#endif

}  // namespace routecast
