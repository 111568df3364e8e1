// Hyper-parameter search by successive halving (Jamieson, Talwalkar 2016): many trials
// with few steps, the better ones with more. Trials are drawn by the seed, spread over
// ranks and trained by each alone; what is finished is not done again. Thread rule: one
// thread a rank; every rank makes the same calls.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "trainer/speculation_trainer.h"

namespace routecast {

// From JSON:
//   {"trials": 27, "factor": 3, "rungs": 3,
//    "space": {"learning_rate": {"log": [1e-4, 1e-2]}, "layers": {"int": [1, 4]},
//              "dropout": {"uniform": [0, 0.3]}, "width": [64, 128, 256]}}
// Names are those of the program's flags that hold a number; see SearchableNames.
class SearchSpace {
 public:
  // Throws UsageError naming the key and what is wrong with it.
  static SearchSpace FromJson(const Json& json, const std::string& what);
  int trials() const { return trials_; }
  int factor() const { return factor_; }
  int rungs() const { return rungs_; }
  // The values of a trial: a pure function of seed and trial.
  std::map<std::string, double> Draw(uint64_t seed, int trial) const;

 private:
  struct Range {
    std::string kind;  // log, uniform, int, list
    std::vector<double> values;
  };
  int trials_ = 0, factor_ = 3, rungs_ = 3;
  std::map<std::string, Range> ranges_;
};

std::vector<std::string> SearchableNames();
// Sets the option that the flag `name` sets. REQUIRES a searchable name.
void SetOption(const std::string& name, double value, SpeculationOptions* options);

// Steps of a rung: the last one has all, each before it 1 / factor of the next.
int64_t RungSteps(int64_t steps, int rung, int rungs, int factor);

struct SearchJob {
  SearchSpace space;
  SpeculationJob run;  // options that are not searched; `out` is the search's folder and
                       // options.steps, which is needed, the last rung's
  // Flags of those options that are not the defaults, but for kind and steps: they belong
  // into best.flags.
  std::map<std::string, std::string> given{};
};
// UsageError where the last rung's steps are not said.
void RequireSteps(const SearchJob& job);
// The training of a trial in a rung: a pure function of the job. UsageError where the
// drawn values are no options.
SpeculationJob TrialRun(const SearchJob& job, int trial, int rung);
// search.json's content: `trials` with values, and steps and validation loss by rung;
// best first. Also writes best.flags, which routecast-train takes as a flag file. Throws
// StoppedError on every rank where one was asked to stop.
Json Search(const SearchJob& job, TraceDataset* dataset,
            const std::vector<RouterWeights>& routers, Communicator* comm);
std::string SearchText(const Json& search);

}  // namespace routecast
