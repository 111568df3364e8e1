// The output folder of a program, as reports read it. Plain values.
#pragma once

#include <string>
#include <vector>

#include "common/files.h"
#include "common/run_record.h"

namespace routecast {

// One output folder. What it is follows from what it holds: results.json with `rows` is
// an evaluation (a replay where its rows carry synthetic_weights), with `scores` a
// trained speculation model; simulation.json policies that were played; stats.json
// statistics of a store; metrics.jsonl alone a pre-training run.
struct RunFolder {
  std::string name;           // the folder's own name
  Json results, stats;        // null where there is none
  Json pretrain;              // pretrain.json; null where there is none
  std::vector<Json> metrics;  // lines of metrics.jsonl
  Json run{};                 // run.json; null where there is none
  Json simulation{};          // simulation.json; null where there is none
};

// Throws UsageError where `path` is no folder, DataError where a file is not valid JSON.
// An unfinished last line of metrics.jsonl (a run that goes on) is skipped.
RunFolder LoadRunFolder(const fs::path& path);

bool IsEvaluation(const RunFolder& folder);
bool IsSimulation(const RunFolder& folder);
bool IsTraining(const RunFolder& folder);

}  // namespace routecast
