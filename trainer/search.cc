#include "trainer/search.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <numeric>

#include "common/errors.h"
#include "common/progress.h"
#include "common/random.h"
#include "report/table.h"
#include "trainer/divergence.h"
#include "trainer/model_setup.h"
#include "trainer/run_plan.h"

namespace routecast {
namespace {

constexpr int kMostTrials = 10000, kMostRungs = 10;
constexpr uint64_t kTrialStream = 0x747269616cULL;
constexpr uint64_t kFewTestSequences = 4;  // a trial is judged by validation alone

struct Searchable {
  const char* name;
  void (*set)(double, SpeculationOptions*);
};
using O = SpeculationOptions;
constexpr Searchable kSearchable[] = {
    {"learning_rate", [](double v, O* o) { o->training.learning_rate = v; }},
    {"weight_decay", [](double v, O* o) { o->training.weight_decay = v; }},
    {"clip_norm", [](double v, O* o) { o->training.clip_norm = v; }},
    {"label_smoothing", [](double v, O* o) { o->training.label_smoothing = v; }},
    {"width", [](double v, O* o) { o->sizes.width = int(v); }},
    {"heads", [](double v, O* o) { o->sizes.heads = int(v); }},
    {"ff", [](double v, O* o) { o->sizes.ff = int(v); }},
    {"layers", [](double v, O* o) { o->sizes.layers = int(v); }},
    {"context", [](double v, O* o) { o->sizes.context = int(v); }},
    {"dropout", [](double v, O* o) { o->sizes.dropout = v; }},
    {"beta1", [](double v, O* o) { o->beta1 = v; }},
    {"beta2", [](double v, O* o) { o->beta2 = v; }},
    {"ema", [](double v, O* o) { o->ema = v; }},
    {"warmup_steps", [](double v, O* o) { o->schedule.warmup_steps = int(v); }},
    {"confidence_weight", [](double v, O* o) { o->confidence_weight = v; }},
    {"set_weight", [](double v, O* o) { o->set_weight = v; }},
    {"distill_weight", [](double v, O* o) { o->distill_weight = v; }},
    {"distill_temperature", [](double v, O* o) { o->distill_temperature = v; }},
    {"augment_layers", [](double v, O* o) { o->augment.layer_dropout = v; }},
    {"augment_parts", [](double v, O* o) { o->augment.subsequence = v; }},
    {"augment_mask", [](double v, O* o) { o->augment.mask = v; }},
};

[[noreturn]] void Bad(const std::string& what, const std::string& why) {
  throw UsageError(ErrorText(
      what + " is not a search space", why,
      R"(e.g. {"trials": 9, "space": {"learning_rate": {"log": [1e-4, 1e-2]}}})"));
}

int Whole(const Json& json, const char* key, int otherwise, int low, int high,
          const std::string& what) {
  if (!json.contains(key)) return otherwise;
  const Json& value = json[key];
  if (!value.is_number_integer() || value.get<int64_t>() < low ||
      value.get<int64_t>() > high) {
    Bad(what, std::string(key) + "=" + value.dump() + ", expected " +
                  std::to_string(low) + " to " + std::to_string(high));
  }
  return value.get<int>();
}

std::vector<double> Numbers(const Json& list, const std::string& name,
                            const std::string& what) {
  std::vector<double> numbers;
  if (!list.is_array() || list.empty() || list.size() > 1000) {
    Bad(what, name + " has no list of numbers");
  }
  for (const Json& value : list) {
    if (!value.is_number() || !std::isfinite(value.get<double>())) {
      Bad(what, name + " holds " + value.dump());
    }
    numbers.push_back(value.get<double>());
  }
  return numbers;
}

}  // namespace

std::vector<std::string> SearchableNames() {
  std::vector<std::string> names;
  for (const Searchable& s : kSearchable) names.emplace_back(s.name);
  return names;
}

void SetOption(const std::string& name, double value, SpeculationOptions* options) {
  for (const Searchable& s : kSearchable) {
    if (name == s.name) return s.set(value, options);
  }
  throw std::logic_error("no option is named " + name);
}

SearchSpace SearchSpace::FromJson(const Json& json, const std::string& what) {
  SearchSpace space;
  if (!json.is_object() || !json.contains("space") || !json["space"].is_object() ||
      json["space"].empty()) {
    Bad(what, "it has no \"space\"");
  }
  space.trials_ = Whole(json, "trials", 9, 1, kMostTrials, what);
  space.factor_ = Whole(json, "factor", 3, 2, 100, what);
  space.rungs_ = Whole(json, "rungs", 3, 1, kMostRungs, what);
  for (const auto& [name, range] : json["space"].items()) {
    ParseChoice("\"space\"", name, SearchableNames());
    if (range.is_array()) {
      space.ranges_[name] = {"list", Numbers(range, name, what)};
      continue;
    }
    if (!range.is_object() || range.size() != 1) {
      Bad(what, name + " is no list and no log, uniform or int range");
    }
    const std::string kind = range.begin().key();
    ParseChoice(name, kind, {"log", "uniform", "int"});
    const auto ends = Numbers(range.begin().value(), name, what);
    if (ends.size() != 2 || ends[0] > ends[1] || (kind == "log" && ends[0] <= 0)) {
      Bad(what, name + ": " + kind + " needs two ends, the lower first" +
                    (kind == "log" ? ", above 0" : ""));
    }
    space.ranges_[name] = {kind, ends};
  }
  return space;
}

std::map<std::string, double> SearchSpace::Draw(uint64_t seed, int trial) const {
  std::map<std::string, double> values;
  for (const auto& [name, range] : ranges_) {
    const uint64_t bits =
        Mix(seed, kTrialStream, static_cast<uint64_t>(trial), Hash64(name));
    const std::vector<double>& v = range.values;
    const double unit = ToUnit(bits);
    double value = 0;
    if (range.kind == "list") value = v[ToRange(bits, v.size())];
    if (range.kind == "uniform") value = v[0] + unit * (v[1] - v[0]);
    if (range.kind == "log") value = v[0] * std::pow(v[1] / v[0], unit);
    if (range.kind == "int") value = std::floor(v[0] + unit * (v[1] - v[0] + 1));
    values[name] = value;
  }
  return values;
}

int64_t RungSteps(int64_t steps, int rung, int rungs, int factor) {
  double share = static_cast<double>(steps);
  for (int r = rung + 1; r < rungs; ++r) share /= factor;
  return std::max<int64_t>(1, static_cast<int64_t>(share));
}

void RequireSteps(const SearchJob& job) {
  if (job.run.options.steps >= 1) return;
  throw UsageError(ErrorText("--search needs --steps", "the steps of the last rung",
                             "give --steps=N"));
}

SpeculationJob TrialRun(const SearchJob& job, int trial, int rung) {
  SpeculationJob run = job.run;
  DropUnused(&run.options);  // what is drawn has to be of use
  for (const auto& [name, value] : job.space.Draw(job.run.options.seed, trial)) {
    SetOption(name, value, &run.options);
  }
  run.options.steps =
      RungSteps(job.run.options.steps, rung, job.space.rungs(), job.space.factor());
  run.options.test_sequences = kFewTestSequences;
  run.options.Validate();
  RequireUse(run.options);
  char folder[48];
  std::snprintf(folder, sizeof folder, "rung-%d/trial-%04d", rung, trial);
  run.out = job.run.out / folder;
  run.quiet = true;
  return run;
}

namespace {

struct Trial {
  int number = 0;
  std::map<std::string, double> values;
  std::vector<double> losses;  // of validation, by rung
};

SpeculationJob JobOf(const SearchJob& job, const Trial& trial, int rung) {
  return TrialRun(job, trial.number, rung);
}

// Left by a trial whose loss or gradient was not finite, with the options it had.
fs::path DivergedFile(const SpeculationJob& run) { return run.out / "diverged.json"; }

// What the file holds, but for why.
Json TriedBy(const SpeculationJob& run, const TraceDataset& dataset) {
  return {{"options", run.options.ToJson()}, {"traces", dataset.fingerprint()}};
}

bool HasDiverged(const SpeculationJob& run, const TraceDataset& dataset) {
  if (!fs::exists(DivergedFile(run))) return false;
  Json tried = ReadJsonFile(DivergedFile(run));
  tried.erase("why");
  return tried == TriedBy(run, dataset);
}

void TrainTrial(const SpeculationJob& run, TraceDataset* dataset,
                const std::vector<RouterWeights>& routers, Communicator* comm) {
  if (IsFinished(run, *dataset) || HasDiverged(run, *dataset)) return;
  try {
    TrainSpeculation(run, dataset, routers, comm);
  } catch (const DivergedError& e) {
    MakeFolder(run.out);
    Json json = TriedBy(run, *dataset);
    json["why"] = e.what();
    WriteFileAtomic(DivergedFile(run), json.dump(2) + "\n");
  }
}

// Of validation; infinite where the trial diverged.
double LossOf(const SpeculationJob& run, const TraceDataset& dataset) {
  if (HasDiverged(run, dataset)) return std::numeric_limits<double>::infinity();
  return ReadJsonFile(run.out / "results.json").at("validation").at("loss").get<double>();
}

// This rank's trials of the rung. False where it was asked to stop.
bool RunRung(const SearchJob& job, const std::vector<Trial>& trials, int rung,
             TraceDataset* dataset, const std::vector<RouterWeights>& routers,
             const RankInfo& rank) {
  LocalCommunicator alone;
  Progress progress("search, rung " + std::to_string(rung + 1), "trials", trials.size(),
                    job.run.quiet || !rank.is_root());
  for (size_t i = 0; i < trials.size(); ++i) {
    if (static_cast<int>(i) % rank.world != rank.rank) continue;
    const SpeculationJob run = JobOf(job, trials[i], rung);
    try {
      TrainTrial(run, dataset, routers, &alone);
    } catch (const StoppedError&) {
      return false;
    }
    progress.Update(i + 1);
  }
  progress.Finish();
  return true;
}

Json ToJson(const SearchJob& job, const std::vector<Trial>& trials) {
  Json all = Json::array();
  for (const Trial& trial : trials) {
    Json entry = {{"trial", trial.number}, {"values", trial.values}};
    for (size_t rung = 0; rung < trial.losses.size(); ++rung) {
      entry["rungs"].push_back(
          {{"steps", RungSteps(job.run.options.steps, static_cast<int>(rung),
                               job.space.rungs(), job.space.factor())},
           {"validation_loss",
            std::isinf(trial.losses[rung]) ? Json() : Json(trial.losses[rung])}});
    }
    all.push_back(entry);
  }
  return {{"kind", job.run.options.kind}, {"trials", all}};
}

void WriteBest(const SearchJob& job, const Trial& best) {
  std::string flags = "# The best of " + std::to_string(job.space.trials()) +
                      " trials.\n--kind=" + job.run.options.kind +
                      "\n--steps=" + std::to_string(job.run.options.steps) + "\n";
  for (const auto& [name, value] : job.given) {
    if (!best.values.contains(name)) flags += "--" + name + "=" + value + "\n";
  }
  char line[96];
  for (const auto& [name, value] : best.values) {
    std::snprintf(line, sizeof line, "--%s=%.17g\n", name.c_str(), value);
    flags += line;
  }
  WriteFileAtomic(job.run.out / "best.flags", flags);
}

}  // namespace

Json Search(const SearchJob& job, TraceDataset* dataset,
            const std::vector<RouterWeights>& routers, Communicator* comm) {
  RequireSteps(job);
  const RankInfo rank = comm->rank_info();
  std::vector<Trial> alive, out;  // `out`: those that were left behind, best first
  for (int t = 0; t < job.space.trials(); ++t) {
    alive.push_back({t, job.space.Draw(job.run.options.seed, t), {}});
    // Wrong values, before anything is trained.
    ConfigOf(JobOf(job, alive.back(), 0).options, dataset);
  }
  for (int rung = 0; rung < job.space.rungs(); ++rung) {
    const bool whole = RunRung(job, alive, rung, dataset, routers, rank);
    if (comm->Any(!whole)) {
      throw StoppedError("stopped in rung " + std::to_string(rung + 1) +
                         "; start the same command again and it goes on");
    }
    for (Trial& trial : alive) {
      trial.losses.push_back(LossOf(JobOf(job, trial, rung), *dataset));
    }
    std::stable_sort(alive.begin(), alive.end(), [](const Trial& a, const Trial& b) {
      return a.losses.back() < b.losses.back();
    });
    if (std::isinf(alive[0].losses.back())) {
      throw UsageError(
          ErrorText("every trial of rung " + std::to_string(rung + 1) + " diverged", "",
                    "search lower learning rates"));
    }
    if (rung + 1 == job.space.rungs()) break;
    const auto factor = static_cast<size_t>(job.space.factor());
    const size_t kept = std::max<size_t>(1, alive.size() / factor);
    out.insert(out.begin(), alive.begin() + static_cast<int64_t>(kept), alive.end());
    alive.resize(kept);
  }
  alive.insert(alive.end(), out.begin(), out.end());
  const Json search = ToJson(job, alive);
  if (rank.is_root()) {
    WriteBest(job, alive[0]);
    WriteFileAtomic(job.run.out / "search.json", search.dump(2) + "\n");
  }
  comm->Barrier();
  return search;
}

std::string SearchText(const Json& search) {
  std::vector<std::string> columns = {"trial", "steps", "valid. loss"};
  const Json& trials = search.at("trials");
  for (const auto& [name, value] : trials.at(0).at("values").items()) {
    columns.push_back(name);
  }
  Table table(columns);
  for (const Json& trial : trials) {
    const Json& last = trial.at("rungs").back();
    const Json& loss = last.at("validation_loss");
    std::vector<std::string> row = {
        std::to_string(trial.at("trial").get<int>()),
        std::to_string(last.at("steps").get<int64_t>()),
        loss.is_null() ? "diverged" : Fixed(loss.get<double>(), 4)};
    for (const auto& [name, value] : trial.at("values").items()) {
      char text[32];
      std::snprintf(text, sizeof text, "%.4g", value.get<double>());
      row.emplace_back(text);
    }
    table.AddRow(row);
  }
  return table.ToText();
}

}  // namespace routecast
