#include "report/simulation_section.h"

#include <cmath>

#include "report/result_values.h"
#include "report/row_charts.h"
#include "report/svg_chart.h"

namespace routecast {
namespace {

std::string Mebibytes(double bytes) { return Fixed(bytes / (1 << 20), 0); }

Table TableOf(const RowGroup& group) {
  Table table({"<row", "tokens/s", "speed-up", "hit rate %", "useful MiB", "late MiB",
               "wasted MiB", "stall s", "asking s", "bound"});
  for (const Json& row : group.rows) {
    table.AddRow(
        {Labelled(row), Fixed(NumberOf(row, "tokens_per_second"), 1),
         Fixed(NumberOf(row, "speed_up"), 2), Fixed(NumberOf(row, "hit_rate") * 100, 1),
         Mebibytes(NumberOf(row, "bytes_useful")), Mebibytes(NumberOf(row, "bytes_late")),
         Mebibytes(NumberOf(row, "bytes_wasted")),
         Fixed(NumberOf(row, "stall_seconds"), 2),
         Fixed(NumberOf(row, "question_seconds"), 2), Fixed(NumberOf(row, "bound"), 2)});
  }
  return table;
}

std::string BudgetOf(const RowGroup& group) {
  const Json& row = group.rows[0];
  return (group.name.empty() ? "" : group.name + " of the experts: ") +
         ShortNumber(NumberOf(row, "slots")) + " slots, " +
         Mebibytes(NumberOf(row, "budget_bytes")) + " MiB";
}

std::vector<RowGroup> BudgetsOf(const RunFolder& f) {
  return GroupsOf(EntriesWith(f.simulation, "policy"));
}

}  // namespace

void AddSimulation(const RunFolder& f, HtmlReport* page) {
  const Json profile = f.simulation.value("profile", Json::object());
  page->Section("Simulated on the profile " + TextOf(profile, "name"));
  page->Paragraph(
      "Recorded routing of test documents is played through the runtime's own planner "
      "and "
      "cache under a virtual clock, batch 1: no weights are read, and computing takes "
      "what "
      "reading a step's weights once takes on that device. Experts are those of an "
      "imagined model." +
      std::string(FlagOf(profile, "emulated")
                      ? " Emulated: the profile is from a data sheet, not measured."
                      : ""));
  const std::vector<RowGroup> budgets = BudgetsOf(f);
  const std::string from =
      budgets.empty() ? "" : TextOf(budgets[0].rows[0], "imagined_from");
  if (!from.empty()) page->Paragraph("Figures of the imagined model: " + from + ".");
  page->Charts(SimulationCharts(budgets));
  for (const RowGroup& group : budgets) page->AddTable(TableOf(group), BudgetOf(group));
  page->Paragraph(
      "The bound (Tc+Tx)/max(Tc,Tx) has Tc of the model's own work and Tx of what "
      "on-demand LRU waits beyond it: what overlap alone can give over it. A row that "
      "keeps better experts than LRU moves less and may pass it.");
}

void SummariseSimulation(const RunFolder& f,
                         std::vector<std::pair<std::string, std::string>>* figures) {
  for (const RowGroup& group : BudgetsOf(f)) {
    const Json* best = nullptr;
    for (const Json& row : group.rows) {
      const std::string predictor = TextOf(row, "predictor");
      if (predictor.empty() || predictor == "none" || predictor == "oracle") continue;
      if (!best || NumberOf(row, "speed_up") > NumberOf(*best, "speed_up")) best = &row;
    }
    if (!best || !std::isfinite(NumberOf(*best, "speed_up"))) continue;
    figures->push_back({"simulated" + (group.name.empty() ? "" : ", " + group.name) +
                            ": " + Labelled(*best) + " over on-demand LRU (bound " +
                            Fixed(NumberOf(*best, "bound"), 2) + ")",
                        Fixed(NumberOf(*best, "speed_up"), 2) + "x"});
  }
}

}  // namespace routecast
