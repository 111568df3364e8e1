#include "trainer/run_plan.h"

#include <algorithm>
#include <cstdio>

#include "models/speculation_onnx.h"
#include "report/table.h"
#include "trainer/model_setup.h"
#include "trainer/question_timing.h"
#include "trainer/speculation_size.h"
#include "trainer/train_state.h"

namespace routecast {
namespace {

// What is there of some runs of one size.
struct Progress {
  int runs = 0, done = 0, begun = 0;
  int64_t steps_to_go = 0;

  void Add(const SpeculationJob& run, const TraceDataset& dataset, int64_t steps) {
    ++runs;
    if (IsFinished(run, dataset)) {
      ++done;
      return;
    }
    const auto newest = NewestStep(run.out / "state");
    begun += newest.has_value();
    steps_to_go += std::max<int64_t>(0, steps - newest.value_or(0));
  }
  void Add(const Progress& other) {
    runs += other.runs;
    done += other.done;
    begun += other.begun;
    steps_to_go += other.steps_to_go;
  }
  int to_go() const { return runs - done; }
};

std::string Summary(const Progress& all, uint64_t bytes_to_come, const fs::path& out) {
  char text[512];
  std::snprintf(text, sizeof text,
                "%d runs: %d done, %d begun, %d to go; %lld steps at most\n"
                "disk: %s of weights to come, %s are free at %s\n",
                all.runs, all.done, all.begun, all.to_go(),
                static_cast<long long>(all.steps_to_go),
                FormatBytes(bytes_to_come).c_str(), FormatBytes(FreeBytes(out)).c_str(),
                out.c_str());
  return text;
}

uint64_t WeightBytes(int64_t parameters, int runs) {
  return static_cast<uint64_t>(parameters) * sizeof(float) * static_cast<uint64_t>(runs);
}

// Of all trials, the one that looks largest.
SpeculationOptions LargestOf(const SearchJob& job, TraceDataset* dataset) {
  SpeculationOptions largest;
  double most = -1;
  for (int t = 0; t < job.space.trials(); ++t) {
    const SpeculationOptions o = TrialRun(job, t, 0).options;
    ConfigOf(o, dataset);  // wrong sizes, of any trial
    const double width = std::max(1, o.sizes.width);
    const double size =
        width * std::max(width, double(o.sizes.ff)) * std::max(1, o.sizes.layers);
    if (size <= most) continue;
    most = size;
    largest = o;
  }
  return largest;
}

}  // namespace

bool IsFinished(const SpeculationJob& run, const TraceDataset& dataset) {
  for (const char* file : {"results.json", "config.json", "model.safetensors"}) {
    if (!fs::exists(run.out / file)) return false;
  }
  const Json config = ReadJsonFile(run.out / "config.json");
  if (!config.contains("extra") || !config["extra"].contains("options") ||
      config["extra"]["options"] != run.options.ToJson()) {
    return false;
  }
  const Json& extra = config["extra"];
  if (extra.contains("traces") && extra["traces"] != dataset.fingerprint()) return false;
  if (extra.value("further_stores", size_t{0}) != run.also.size()) return false;
  return !extra.contains("time_limit") ||
         (run.time_limit > 0 && run.time_limit <= extra["time_limit"].get<double>());
}

Json KeepFinished(const SpeculationJob& run) {
  if (run.onnx) {
    WriteSpeculationOnnx(run.out / "onnx", *LoadSpeculationModel(run.out).model);
  }
  return ReadJsonFile(run.out / "results.json");
}

std::string DescribeLeaderboard(const LeaderboardJob& job, TraceDataset* dataset,
                                bool routers, int world) {
  if (!job.checkpoint.empty()) RequireTracedModel(job.checkpoint, dataset->geometry());
  Table table(
      {"<entry", "parameters", "memory a rank", "steps a run", "runs", "done", "begun"});
  Progress all;
  uint64_t bytes = 0;
  for (const LeaderboardEntry& entry : EntriesOf(job, dataset, routers)) {
    if (!entry.trained) {
      table.AddRow({entry.name, "-", "-", "-", "1", "1", "0"});
      all.Add(Progress{1, 1, 0, 0});
      continue;
    }
    const SpeculationSize size = SizeOf(RunOf(job, entry, 0).options, dataset);
    Progress progress;
    for (size_t i = 0; i < entry.folders.size(); ++i) {
      progress.Add(RunOf(job, entry, i), *dataset, size.steps);
    }
    all.Add(progress);
    bytes += WeightBytes(size.parameters, progress.to_go());
    table.AddRow({entry.name, std::to_string(size.parameters), FormatBytes(size.bytes),
                  std::to_string(size.steps), std::to_string(progress.runs),
                  std::to_string(progress.done), std::to_string(progress.begun)});
  }
  const std::string out = job.run.out.string();
  std::string left_out = LeftOutText(KindsLeftOut(job, dataset, routers));
  if (!left_out.empty()) left_out += "\n";
  char limit[64] = "";
  if (job.kind_seconds > 0) {
    std::snprintf(limit, sizeof limit, ", %g s of training each at most",
                  job.kind_seconds / job.seeds);
  }
  return "traces: " + dataset->SplitJson().dump() + "\ntable: " + out +
         "/leaderboard.{json,csv,html}; runs: " + out +
         "/KIND/seed-N, one after another on " + std::to_string(world) + " ranks" +
         limit + "\nmemory is before activations and traces\n" + table.ToText() +
         left_out + Summary(all, bytes, job.run.out);
}

std::string DescribeSearch(const SearchJob& job, TraceDataset* dataset, int world) {
  RequireSteps(job);
  const SpeculationSize size = SizeOf(LargestOf(job, dataset), dataset);
  Table table({"rung", "trials", "steps a trial", "done", "begun"});
  Progress all;
  int alive = job.space.trials();
  for (int rung = 0; rung < job.space.rungs(); ++rung) {
    const int64_t steps = TrialRun(job, 0, rung).options.steps;
    // Which trials come so far is not known; those that did have left their folders.
    Progress progress;
    for (int t = 0; t < job.space.trials(); ++t) {
      const SpeculationJob run = TrialRun(job, t, rung);
      if (fs::exists(run.out)) progress.Add(run, *dataset, steps);
    }
    progress.steps_to_go += std::max(0, alive - progress.runs) * steps;
    progress.runs = std::max(progress.runs, alive);
    table.AddRow({std::to_string(rung + 1), std::to_string(alive), std::to_string(steps),
                  std::to_string(progress.done), std::to_string(progress.begun)});
    all.Add(progress);
    alive = std::max(1, alive / job.space.factor());
  }
  const std::string out = job.run.out.string();
  return "traces: " + dataset->SplitJson().dump() + "\nresult: " + out +
         "/{search.json,best.flags}; trials: " + out +
         "/rung-R/trial-N, each on one of " + std::to_string(world) +
         " ranks\nmodel: " + job.run.options.kind + ", at most " +
         std::to_string(size.parameters) +
         " parameters; memory: " + FormatBytes(size.bytes) +
         " a rank before activations and traces\n" + table.ToText() +
         Summary(all, WeightBytes(size.parameters, all.to_go()), job.run.out);
}

}  // namespace routecast
