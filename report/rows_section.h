// What prediction bought: the rows of an evaluation as charts and tables.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "report/html_report.h"
#include "report/run_folder.h"

namespace routecast {

// REQUIRES IsEvaluation(folder).
void AddRows(const RunFolder& folder, HtmlReport* page);
// Key figures: the best predictor's speed-up in each group of comparable rows.
void SummariseRows(const RunFolder& folder,
                   std::vector<std::pair<std::string, std::string>>* figures);

}  // namespace routecast
