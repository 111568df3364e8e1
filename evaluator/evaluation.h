// routecast-evaluate as a function: Options -> Validate -> Evaluate.
// Thread rule: one thread.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "evaluator/comparison.h"
#include "evaluator/replay.h"

namespace routecast {

struct EvaluationOptions {             // one field a flag of the same name
  fs::path model;                      // checkpoint folder; empty = replay of `store`
  fs::path store;                      // trace store: sequences, train part for baselines
  std::vector<std::string> prompts;    // generate: text files, KIND:PATH (requests.h)
  std::vector<std::string> predictor;  // names and folders of trained runs
  std::vector<std::string> policies = {"auto"};  // ParsePolicies'
  std::string eviction = "lru";
  // --expert_budget: shares of the experts of the stacks that run, or bytes; a comparison
  // each.
  std::vector<std::string> budgets = {"25%"};
  bool budget_given = true;         // false: the default, which --tier may overrule
  bool kv_in_budget = false;        // keys and values count against the budget
  std::string tier;                 // tier_spec.h; empty: host,disk
  std::string copies = "lossless";  // int8, int4, sparse: lossy rows beside the others
  // What slots hold before the first step: none, auto (the most used experts of the
  // store's train part), another store, or load.csv of routecast-trace stats.
  std::string warm_start = "none";
  std::string phase = "decoder";  // replay: decoder, encoder or both
  std::string link = "auto";
  std::string profile;             // device that this one is to be like; empty: itself
  std::vector<int> batches = {1};  // a comparison each
  // in_order; by_route: batches of requests whose foretold experts overlap, rows too
  std::vector<std::string> schedules = {"in_order"};
  int max_new_tokens = 16;  // decoder steps a segment
  int rounds = 20;          // interleaved, measured
  int warmup_rounds = 3;
  bool compare = false;           // the rows of docs/metrics.md; else LRU and predictors
  std::string baselines = "all";  // of compare: all, simple or none
  bool timeline = false;          // writes timeline.json, of one more round
  fs::path out;                   // results.json, run.json, report.html; empty: none
  std::vector<fs::path> report_with;  // other runs' folders that the report shows as well
  fs::path cache;                     // expert files; empty: the user's cache folder
  std::string device = "auto", dtype = "fp32";
  uint64_t seed = 1;
  bool quiet = false, dry_run = false;
  // Not flags: the geometry of a replay (its batch, tokens and stacks follow from the
  // above), and the time spent on measuring the link.
  ReplayOptions replay;
  double peak_seconds = 0.5;
  bool guess_next_token = true;  // where the vocabulary head is known
  StepMemory steps = StepMemory::kByDevice;
  // A test's device for the gpu tier, whose memory the CPU can read; null: --device's.
  std::function<std::unique_ptr<DeviceCopy>()> open_device;
};

// "1,4,16,32" -> sizes; UsageError naming what is none.
std::vector<int> ParseBatches(const std::string& text);
// An --eviction that a runtime can serve: one, and none that knows the future. UsageError
// naming the nearest.
Eviction ServedEviction(const std::string& name);
// Whether --predictor names any but none and the oracle, which are rows of their own.
bool NamesPredictor(const std::vector<std::string>& names);
// UsageError where `flag`, a count, is not within its bounds; naming these.
void RequireCount(const char* flag, int value, int least, int most = 1'000'000);
// UsageError where a list names one thing twice: rows of both would look like one's.
void RequireDistinct(const char* flag, std::vector<std::string> items);
// Throws UsageError for what is wrong, or does not fit together, without reading weights.
void ValidateEvaluation(const EvaluationOptions& options);
// rows.csv's page: report.html of `out` and the folders of --report_with that are there.
// A page that would be too large is left out, with a line that says so.
void WriteReport(const fs::path& out, const std::vector<fs::path>& with);
// Runs and writes; prints the table, or the plan where dry_run. Headline figures for
// run.json. Throws std::logic_error when two rows put out different bits.
Json Evaluate(const EvaluationOptions& options, const Json& configuration);

}  // namespace routecast
