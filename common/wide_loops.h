// ROUTECAST_WIDE before a function: one binary whose loops use the widest vectors of the
// machine it runs on. Sanitizers cannot run the resolvers that this needs.
#pragma once

#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define ROUTECAST_WIDE \
  __attribute__((target_clones("avx512f", "avx2", "default"), optimize("O3")))
#else
#define ROUTECAST_WIDE
#endif

#if defined(__x86_64__)
// Whether loops that are written for AVX2 can run here.
inline bool HasAvx2() {
  static const bool has = __builtin_cpu_supports("avx2");
  return has;
}
#endif
