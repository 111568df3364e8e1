// Pictures of an evaluation's rows. A value that a results file lacks is left out, and a
// chart without values is not made. Thread rule: pure functions, any thread.
#pragma once

#include <string>
#include <vector>

#include "report/run_folder.h"

namespace routecast {

struct RowGroup {  // rows that may be compared with each other
  std::string name;
  std::vector<Json> rows;
};
// Rows by phase, batch size, prompts, schedule and budget, in the order of their first.
std::vector<RowGroup> GroupsOf(const std::vector<Json>& rows);
// Those of an evaluation's folder.
std::vector<RowGroup> GroupsOf(const RunFolder& folder);

// Rows of compressed experts, which put out something else and say so.
bool IsLossy(const Json& row);
std::string Labelled(const Json& row);

// Tokens a second, and how its ratio to on-demand LRU spreads beside the bound.
std::vector<std::string> SpeedCharts(const RowGroup& group);
// Where a token's time goes, how both parts spread, the tail of its steps, what became of
// prefetches, what asking costs, and the ratio to on-demand LRU against that cost.
std::vector<std::string> DetailCharts(const RowGroup& group);
// Tokens a second, its ratio to on-demand LRU and what of it is effect, hit rate, a
// step's median and tail, and the memory of experts against batch sizes, of a folder with
// several.
std::vector<std::string> BatchCharts(const RunFolder& folder);
// Tokens a second, with the best of all rows by memory, and hit rate against the expert
// memory, of runs with several budgets.
std::vector<std::string> MemoryCharts(const std::vector<RunFolder>& folders);
// Tokens a second, their ratio to on-demand LRU, hit rate and bytes moved of rows that
// were played: against the expert memory where there are several budgets, else a bar
// each.
std::vector<std::string> SimulationCharts(const std::vector<RowGroup>& budgets);

}  // namespace routecast
