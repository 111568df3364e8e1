// How well models and baselines predict: charts by layer and lead, a table of everything.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "report/html_report.h"
#include "report/run_folder.h"

namespace routecast {

// Draws what the training folders hold; nothing where there is none.
void AddAccuracy(const std::vector<RunFolder>& folders, HtmlReport* page);
// Key figures: each learned model's accuracy at lead 1 and the best baseline's.
void SummariseAccuracy(const std::vector<RunFolder>& folders,
                       std::vector<std::pair<std::string, std::string>>* figures);

}  // namespace routecast
