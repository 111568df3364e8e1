// report.html of a loop: what was trained, what it predicts, what that bought. Reads the
// result files that the programs write (common names and keys in docs/architecture.md),
// takes what is there and leaves out the rest: a folder of one evaluation alone gives a
// page as well. Thread rule: one thread at a time.
#pragma once

#include <string>
#include <vector>

#include "common/files.h"
#include "report/run_folder.h"

namespace routecast {

// The page's text. Sections: summary, rows, simulated rows, accuracy by layer and
// lead, expert load, loss curves. Throws std::length_error beyond HtmlReport::kMaxBytes.
std::string EvaluationReportHtml(const std::vector<RunFolder>& folders);

// Loads `folders` (those that exist) and writes the page to `html`, atomically.
void WriteEvaluationReport(const fs::path& html, const std::vector<fs::path>& folders);

}  // namespace routecast
