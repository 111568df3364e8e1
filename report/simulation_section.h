// What policies, predictors and caches would buy: the rows of a simulation as charts and
// tables.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "report/html_report.h"
#include "report/run_folder.h"

namespace routecast {

// REQUIRES IsSimulation(folder).
void AddSimulation(const RunFolder& folder, HtmlReport* page);
// Key figures: the best predictor's speed-up under each budget.
void SummariseSimulation(const RunFolder& folder,
                         std::vector<std::pair<std::string, std::string>>* figures);

}  // namespace routecast
