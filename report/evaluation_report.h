// report.html of a loop: what was trained, what it predicts, what that bought. Reads the
// result files that the programs write (common names and keys in docs/architecture.md),
// takes what is there and leaves out the rest: a folder of one evaluation alone gives a
// page as well. Thread rule: one thread at a time.
#pragma once

#include <string>
#include <vector>

#include "common/files.h"
#include "common/run_record.h"

namespace routecast {

// One output folder. What it is follows from what it holds: results.json with `rows` is
// an evaluation (a replay where its rows carry synthetic_weights), with `scores` a
// trained speculation model; stats.json statistics of a store; metrics.jsonl alone a
// pre-training run.
struct RunFolder {
  std::string name;           // the folder's own name
  Json results, stats;        // null where there is none
  std::vector<Json> metrics;  // lines of metrics.jsonl
};

// Throws UsageError where `path` is no folder, DataError where a file is not valid JSON.
// An unfinished last line of metrics.jsonl (a run that goes on) is skipped.
RunFolder LoadRunFolder(const fs::path& path);

// The page's text. Sections: summary, accuracy by layer and lead, expert load, loss
// curves, rows. Throws std::length_error beyond HtmlReport::kMaxBytes.
std::string EvaluationReportHtml(const std::vector<RunFolder>& folders);

// Loads `folders` (those that exist) and writes the page to `html`, atomically.
void WriteEvaluationReport(const fs::path& html, const std::vector<fs::path>& folders);

}  // namespace routecast
