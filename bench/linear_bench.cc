// The engine's float32 products by numbers of rows: LibTorch's, oneDNN's and the own
// loops, interleaved in one run. Weights come from memory, as an engine's do, which
// passes over all its layers before it sees one again: --weights_mib of them take turns.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>
#include <gflags/gflags.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>

#include "models/linear.h"
#include "models/onednn_linear.h"

DEFINE_int32(threads, 1, "Threads");
DEFINE_int32(rounds, 7, "Rounds; all sides once a round");
DEFINE_double(gflop, 2, "Work of one side in a round");
DEFINE_int32(weights_mib, 128, "Weights of one shape that take turns");

namespace routecast {
namespace {

using Clock = std::chrono::steady_clock;

struct Side {
  const char* name;
  std::function<at::Tensor(const at::Tensor&, const at::Tensor&)> multiply;
  std::vector<double> rates;
};

void Measure(int64_t rows, int64_t depth, int64_t columns) {
  const int64_t bytes = depth * columns * 4;
  std::vector<at::Tensor> weights;
  for (int64_t held = 0; held < int64_t{FLAGS_weights_mib} << 20; held += bytes) {
    weights.push_back(at::randn({columns, depth}));
  }
  const at::Tensor x = at::randn({rows, depth});
  const double flop = 2.0 * static_cast<double>(rows * depth * columns);
  const int runs = std::max(1, static_cast<int>(FLAGS_gflop * 1e9 / flop));
  std::vector<Side> sides = {
      {"library", [](const auto& a, const auto& w) { return at::linear(a, w); }, {}},
      {"oneDNN", [](const auto& a, const auto& w) { return OneDnnLinear(a, w); }, {}},
      {"own loops", OwnLinear, {}}};
  size_t next = 0;
  for (int round = -1; round < FLAGS_rounds; ++round) {
    for (Side& side : sides) {
      const auto begin = Clock::now();
      for (int i = 0; i < runs; ++i) side.multiply(x, weights[next++ % weights.size()]);
      const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
      if (round >= 0) side.rates.push_back(flop * runs / seconds / 1e9);
    }
  }
  std::printf("%5lld x %5lld x %5lld", static_cast<long long>(rows),
              static_cast<long long>(depth), static_cast<long long>(columns));
  for (Side& side : sides) {
    std::sort(side.rates.begin(), side.rates.end());
    std::printf("   %s %6.1f [%.1f-%.1f]", side.name, side.rates[side.rates.size() / 2],
                side.rates.front(), side.rates.back());
  }
  std::printf("   GFLOP/s\n");
}

}  // namespace
}  // namespace routecast

int main(int argc, char** argv) {
  gflags::SetUsageMessage("float32 products by numbers of rows");
  gflags::ParseCommandLineFlags(&argc, &argv, true);
  const c10::AutoGradMode no_gradient(false);
  at::set_num_threads(FLAGS_threads);
  std::printf("oneDNN is %s here\n",
              routecast::PrefersOneDnn() ? "preferred" : "not preferred");
  for (const auto& [depth, columns] :
       {std::pair<int64_t, int64_t>{768, 768}, {768, 3072}, {3072, 768}, {512, 1024}}) {
    for (const int64_t rows : {1, 2, 4, 8, 16, 32, 64, 96, 128, 150, 256, 1024}) {
      routecast::Measure(rows, depth, columns);
    }
  }
}
