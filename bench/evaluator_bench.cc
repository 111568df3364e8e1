// What the evaluator's parts cost and reach: cache and planner a decision, the disk
// engine against direct reads alone (the link's peak). Torch-free. Run with the machine
// to itself.
#include <benchmark/benchmark.h>
#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "common/random.h"
#include "evaluator/disk_transfer_engine.h"
#include "evaluator/expert_file.h"
#include "evaluator/prefetch_planner.h"
#include "evaluator/prefetch_simulation.h"
#include "evaluator/simulated_link.h"

namespace routecast {
namespace {

const MoeGeometry kGeometry{6, 6, 128, 1, 768};

void BM_CacheUse(benchmark::State& state) {
  ExpertCache cache(kGeometry, static_cast<int>(state.range(0)), Eviction::kLru);
  uint64_t i = 0;
  for (auto _ : state) {
    const ExpertKey key{6 + static_cast<int>(i % 6),
                        static_cast<int>(ToRange(Mix(i), 128))};
    ++i;
    cache.BeginLayer(key.layer);
    if (cache.state(key) == ExpertCache::State::kAbsent) {
      if (cache.free_slots() == 0) cache.Drop(*cache.Victim());
      cache.Load(key);
      cache.Arrive(key);
    }
    cache.Use(key);
  }
}
BENCHMARK(BM_CacheUse)->Arg(32)->Arg(192);

// One decoder layer: demand, four forecasts of 128 experts, transfers under a manual
// clock.
void BM_PlannerLayer(benchmark::State& state) {
  ManualClock clock;
  ExpertCache cache(kGeometry, static_cast<int>(state.range(0)), Eviction::kLru);
  PrefetchPlanner planner({1 << 20, 1e9, 2, 0.9, true, ParsePolicy("auto")}, &cache,
                          &clock);
  SimulatedLink link({1 << 20, 1 << 18, 1e9, 0, true}, &clock);
  const auto drive = [&] {
    const PlannerActions actions = planner.Poll();
    for (uint64_t id : actions.promote) link.Promote(id);
    for (uint64_t id : actions.cancel) link.Cancel(id);
    for (const TransferOrder& order : actions.start) link.Start(order);
  };
  link.SetDone([&](uint64_t id, TransferOutcome outcome, uint64_t bytes) {
    planner.OnDone(id, outcome, bytes);
    drive();
  });
  std::vector<float> forecast(128, 0.002f);
  uint64_t i = 0;
  for (auto _ : state) {
    const int layer = static_cast<int>(i % 6);
    const int expert = static_cast<int>(ToRange(Mix(i++), 128));
    planner.BeginLayer(6 + layer, std::vector<int>{expert});
    drive();
    for (int lead = 1; lead <= 4; ++lead) {
      forecast[static_cast<size_t>(ToRange(Mix(i, lead), 128))] = 0.5f;
      planner.Predict(6 + (layer + lead) % 6, lead, forecast);
      std::fill(forecast.begin(), forecast.end(), 0.002f);
    }
    drive();
    std::optional<ExpertKey> key;
    while (!(key = planner.TakeReady())) link.AdvanceTo(link.NextEvent());
    planner.Release(*key);
    link.AdvanceTo(clock.Now() + 1e-3);
  }
}
BENCHMARK(BM_PlannerLayer)->Arg(32)->Arg(192);

// Layer steps a second of the simulation (goal: 10^6 a core): a decoder of 6 x 128
// experts, skewed routing; on demand, and with what a predictor said of the next four
// layers.
void BM_Simulation(benchmark::State& state) {
  constexpr int kSteps = 20'000;
  const bool told = state.range(0) != 0;
  std::vector<SimulatedVisit> visits;
  for (uint64_t i = 0; i < kSteps; ++i) {
    const auto expert_at = [](uint64_t visit) {
      const double u = ToUnit(Mix(visit, 3));
      return static_cast<int>(u * u * 128);
    };
    SimulatedVisit visit;
    visit.layer = 6 + static_cast<int>(i % 6);
    visit.experts = {expert_at(i)};
    visit.seconds_before = 2e-4;
    visit.seconds_expert = 1e-4;
    for (uint64_t lead = 1; told && lead <= 4; ++lead) {
      LayerForecast forecast{6 + static_cast<int>((i + lead) % 6), static_cast<int>(lead),
                             std::vector<float>(128, 0.002f)};
      const bool right = ToUnit(Mix(i, lead, 5)) < 0.8;
      forecast.probabilities[static_cast<size_t>(expert_at(right ? i + lead : i))] = 0.8f;
      visit.at_layer.push_back(std::move(forecast));
    }
    visits.push_back(std::move(visit));
  }
  PlannerOptions planner{1 << 20, 4e9,  2,
                         0.9,     true, ParsePolicy(told ? "auto" : "on_demand")};
  // Ranked once, as a search over policies does it, or in every simulation.
  const bool once = state.range(1) != 0;
  const RankedVisits ranked(visits);
  const SimulatedLinkOptions link{1 << 20, 1 << 20, 4e9, 0, true};
  for (auto _ : state) {
    benchmark::DoNotOptimize(
        once ? SimulatePrefetch(kGeometry, 192, Eviction::kLru, planner, link, ranked, 0)
             : SimulatePrefetch(kGeometry, 192, Eviction::kLru, planner, link,
                                std::span<const SimulatedVisit>(visits), 0));
  }
  state.SetItemsProcessed(state.iterations() * kSteps);
}
BENCHMARK(BM_Simulation)
    ->Args({0, 1})
    ->Args({1, 1})
    ->Args({1, 0})
    ->Unit(benchmark::kMillisecond);

// A file of full-size experts (switch-base, fp32) in the working folder, removed at the
// end.
struct ExpertsOnDisk {
  ExpertsOnDisk() : path(fs::absolute("evaluator_bench." + std::to_string(::getpid()))) {
    ExpertFileSpec spec;
    spec.geometry = {0, 1, 24, 1, 768};
    spec.d_ff = 3072;
    WriteSyntheticExperts(path, spec, {0}, true);
    file = std::make_shared<const ExpertFile>(path);
  }
  ~ExpertsOnDisk() { fs::remove(path); }
  fs::path path;
  std::shared_ptr<const ExpertFile> file;
};
const ExpertsOnDisk& Experts() {
  static const ExpertsOnDisk experts;
  return experts;
}

// Direct reads of whole megabytes by `threads`, into locked memory, and nothing else.
double DirectReadsAlone(int threads, double seconds) {
  const fs::path& path = Experts().path;
  const int fd = ::open(path.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC);
  if (fd < 0) return 0;
  constexpr uint64_t kChunk = 1 << 20;
  const uint64_t chunks = fs::file_size(path) / kChunk;
  SlotArena arena(threads, kChunk);
  std::atomic<uint64_t> next{0}, bytes{0};
  const SteadyClock clock;
  std::vector<std::thread> readers;
  for (int i = 0; i < threads; ++i) {
    readers.emplace_back([&, i] {
      while (clock.Now() < seconds) {
        const uint64_t chunk = next++ % chunks;
        const ssize_t n =
            ::pread(fd, arena.slot(i), kChunk, static_cast<off_t>(chunk * kChunk));
        if (n > 0) bytes += static_cast<uint64_t>(n);
      }
    });
  }
  for (std::thread& reader : readers) reader.join();
  const double rate = static_cast<double>(bytes) / clock.Now();
  ::close(fd);
  return rate;
}

// Both in one run, interleaved: counters in bytes a second, and their ratio.
void BM_LinkAgainstDirectReads(benchmark::State& state) {
  DiskEngineOptions options;
  options.num_threads = static_cast<int>(state.range(0));
  DiskTransferEngine engine(Experts().file, 4, options);
  const std::vector<ExpertKey> keys = Experts().file->keys();
  double alone = 0, link = 0;
  for (auto _ : state) {
    alone += DirectReadsAlone(options.num_threads, 0.3);
    link += MeasurePeak(&engine, keys, 4, 0.3);
  }
  const auto rounds = static_cast<double>(state.iterations());
  state.counters["direct_reads"] = alone / rounds;
  state.counters["engine"] = link / rounds;
  state.counters["share"] = alone > 0 ? link / alone : 0;
}
BENCHMARK(BM_LinkAgainstDirectReads)
    ->Arg(2)
    ->Arg(3)
    ->Arg(4)
    ->Iterations(5)
    ->UseRealTime();

}  // namespace
}  // namespace routecast

BENCHMARK_MAIN();
