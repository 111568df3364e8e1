// What a machine can do at most, measured: the two sides of a roofline.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <vector>

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

constexpr int kChains = 16;  // sums that do not wait for each other
constexpr int64_t kTurns = 4'000'000;

// Fused multiply-adds on registers alone; returns a number that depends on all of them.
template <class Vector>
[[gnu::always_inline]] inline float Turn() {
  Vector sums[kChains];
  for (int c = 0; c < kChains; ++c) sums[c] = Vector{} + static_cast<float>(c);
  Vector factor = Vector{} + .9999F, term = Vector{} + .0001F;
  for (int64_t i = 0; i < kTurns; ++i) {
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) sums[c] = sums[c] * factor + term;
    asm volatile("" : "+m"(factor), "+m"(term));  // the loop has to be run
  }
  float all = 0;
  for (int c = 0; c < kChains; ++c) all += sums[c][0];
  return all;
}

typedef float Floats4 __attribute__((vector_size(16)));
inline float TurnPlain() { return Turn<Floats4>(); }
#if defined(__x86_64__)
typedef float Floats8 __attribute__((vector_size(32)));
typedef float Floats16 __attribute__((vector_size(64)));
[[gnu::target("avx2,fma")]] inline float TurnAvx2() { return Turn<Floats8>(); }
[[gnu::target("avx512f,fma")]] inline float TurnAvx512() { return Turn<Floats16>(); }
#endif

inline double FlopsOfCpu() {
  float (*turn)() = TurnPlain;
  int width = 4;
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
    at::parallel_for(0, threads, 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) results[static_cast<size_t>(i)] = turn();
    });
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
