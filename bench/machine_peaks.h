// What a machine can do at most, measured: the two sides of a roofline.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace routecast {

struct MachinePeaks {
  double flops = 0;             // multiplications and additions a second
  double bytes_per_second = 0;  // read from memory
  // The least time of work that needs both.
  double Least(double flop, double bytes) const {
    return std::max(flop / flops, bytes / bytes_per_second);
  }
};

namespace peaks {

// Of `runs`, so that a disturbed one does not count.
inline double LeastSecondsOf(int runs, const std::function<void()>& work) {
  double least = 1e30;
  for (int i = 0; i < runs; ++i) {
    const auto start = std::chrono::steady_clock::now();
    work();
    least = std::min(
        least,
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return least;
}

constexpr int kChains = 10;  // sums that do not wait for each other
constexpr int64_t kTurns = 8'000'000;

// Fused multiply-adds on registers alone; a number that depends on all of them.
#define ROUTECAST_TURN(Set, Add, First)                                               \
  auto a = Set(0), b = Set(1), c = Set(2), d = Set(3), e = Set(4), f = Set(5),        \
       g = Set(6), h = Set(7), k = Set(8), l = Set(9);                                \
  const auto factor = Set(.9999F), term = Set(1e-4F);                                 \
  for (int64_t i = 0; i < kTurns; ++i) {                                              \
    a = Add(a, factor, term), b = Add(b, factor, term), c = Add(c, factor, term);     \
    d = Add(d, factor, term), e = Add(e, factor, term), f = Add(f, factor, term);     \
    g = Add(g, factor, term), h = Add(h, factor, term), k = Add(k, factor, term);     \
    l = Add(l, factor, term);                                                         \
  }                                                                                   \
  return First(a) + First(b) + First(c) + First(d) + First(e) + First(f) + First(g) + \
         First(h) + First(k) + First(l);

inline float Same(float x) { return x; }
inline float PlainAdd(float a, float b, float c) { return a * b + c; }
inline float TurnPlain() { ROUTECAST_TURN(Same, PlainAdd, Same) }
#if defined(__x86_64__)
[[gnu::target("avx2,fma")]] inline float TurnAvx2() {
  ROUTECAST_TURN(_mm256_set1_ps, _mm256_fmadd_ps, _mm256_cvtss_f32)
}
[[gnu::target("avx512f")]] inline float TurnAvx512() {
  ROUTECAST_TURN(_mm512_set1_ps, _mm512_fmadd_ps, _mm512_cvtss_f32)
}
#endif
#undef ROUTECAST_TURN

inline double FlopsOfCpu() {
  float (*turn)() = TurnPlain;
  int width = 1;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) {
    turn = TurnAvx512;
    width = 16;
  } else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    turn = TurnAvx2;
    width = 8;
  }
#endif
  const int threads = at::get_num_threads();
  std::vector<float> results(static_cast<size_t>(threads));
  const double seconds = LeastSecondsOf(5, [&] {
    std::vector<std::jthread> all;
    for (float& result : results) all.emplace_back([&result, turn] { result = turn(); });
  });
  return 2.0 * kChains * width * static_cast<double>(kTurns) * threads / seconds;
}

}  // namespace peaks

// float32 of this process' threads: multiply-adds on registers, and sums of 1 GiB.
inline MachinePeaks PeaksOfCpu() {
  const at::Tensor memory = at::ones({int64_t{1} << 28});
  const double seconds = peaks::LeastSecondsOf(5, [&] { memory.sum(); });
  return {peaks::FlopsOfCpu(), static_cast<double>(memory.nbytes()) / seconds};
}

}  // namespace routecast
