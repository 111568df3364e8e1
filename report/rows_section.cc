#include "report/rows_section.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "report/result_values.h"
#include "report/svg_chart.h"

namespace routecast {
namespace {

bool IsReplay(const std::vector<Json>& rows) {
  return std::any_of(rows.begin(), rows.end(),
                     [](const Json& row) { return FlagOf(row, "synthetic_weights"); });
}

struct RowGroup {  // rows that may be compared with each other
  std::string name;
  std::vector<Json> rows;
};

std::vector<RowGroup> GroupsOf(const RunFolder& f) {
  std::vector<RowGroup> groups;
  for (const Json& row : EntriesWith(f.results, "policy")) {
    const double batch = NumberOf(row, "batch");
    std::string name = TextOf(row, "phase");
    if (std::isfinite(batch))
      name += (name.empty() ? "" : ", ") + std::string("batch ") + ShortNumber(batch);
    for (const char* key : {"prompts", "schedule"}) {
      const std::string value = TextOf(row, key);
      if (!value.empty() && value != "in_order") name += ", " + value;
    }
    auto it = std::find_if(groups.begin(), groups.end(),
                           [&](const RowGroup& g) { return g.name == name; });
    if (it == groups.end()) it = groups.insert(groups.end(), {name, {}});
    it->rows.push_back(row);
  }
  return groups;
}

std::string Mebibytes(double bytes) { return Fixed(bytes / (1 << 20), 1); }

// Rows of compressed experts, which put out something else and say so.
bool IsLossy(const Json& row) {
  const std::string copies = TextOf(row, "copies");
  return !copies.empty() && copies != "lossless";
}

std::string Labelled(const Json& row) {
  return RowName(row) + (IsLossy(row) ? ", LOSSY " + TextOf(row, "copies") : "");
}

Table RowTable(const RowGroup& group) {
  Table table({"<row", "tokens/s", "speed-up", "p50 ms", "p95 ms", "hit rate %",
               "useful MiB", "late MiB", "wasted MiB", "stall s", "Tc s", "Tx s", "bound",
               "<output"});
  for (const Json& row : group.rows) {
    const std::string hash = TextOf(row, "output_sha256");
    table.AddRow(
        {Labelled(row), Fixed(NumberOf(row, "tokens_per_second"), 1),
         Fixed(NumberOf(row, "speed_up"), 2), Fixed(NumberOf(row, "p50_ms"), 2),
         Fixed(NumberOf(row, "p95_ms"), 2), Fixed(NumberOf(row, "hit_rate") * 100, 1),
         Mebibytes(NumberOf(row, "bytes_useful")), Mebibytes(NumberOf(row, "bytes_late")),
         Mebibytes(NumberOf(row, "bytes_wasted")),
         Fixed(NumberOf(row, "stall_seconds"), 2),
         Fixed(NumberOf(row, "compute_seconds"), 2),
         Fixed(NumberOf(row, "transfer_seconds"), 2), Fixed(NumberOf(row, "bound"), 2),
         hash.substr(0, 8)});
  }
  return table;
}

Table LossyTable(const RowGroup& group) {
  Table table({"<row", "speed-up", "texts equal %", "texts", "KL, nats", "perplexity %"});
  for (const Json& row : group.rows) {
    if (!IsLossy(row)) continue;
    table.AddRow({Labelled(row), Fixed(NumberOf(row, "speed_up"), 2),
                  Fixed(100 * NumberOf(row, "exact_match"), 1),
                  ShortNumber(NumberOf(row, "compared_sequences")),
                  Fixed(NumberOf(row, "logit_kl"), 4),
                  Fixed(100 * NumberOf(row, "perplexity_change"), 2)});
  }
  return table;
}

std::string RowChart(const RowGroup& group) {
  BarChart chart{"Tokens a second" + (group.name.empty() ? "" : ", " + group.name),
                 "tokens/s",
                 {},
                 {{"median", {}, {}}},
                 0};
  for (const Json& row : group.rows) {
    chart.categories.push_back(Labelled(row));
    chart.series[0].values.push_back(NumberOf(row, "tokens_per_second"));
  }
  return BarChartSvg(chart);
}

bool SameOutput(const RowGroup& group) {
  std::set<std::string> hashes;
  for (const Json& row : group.rows) {
    if (!IsLossy(row)) hashes.insert(TextOf(row, "output_sha256"));
  }
  return hashes.size() == 1 && !hashes.begin()->empty();
}

}  // namespace

void AddRows(const RunFolder& f, HtmlReport* page) {
  const std::vector<Json> rows = EntriesWith(f.results, "policy");
  const bool replay = IsReplay(rows);
  page->Section(replay ? "Replay at full-size geometry" : "Generation under a budget");
  if (replay) {
    page->Paragraph(
        "Recorded tokens, experts and gates of test documents are played through "
        "the same runtime with synthetic weights of full size, every expert with "
        "bytes of its own on disk.");
  }
  const bool emulated = std::any_of(rows.begin(), rows.end(),
                                    [](const Json& r) { return FlagOf(r, "emulated"); });
  if (emulated) {
    page->Paragraph(
        "Emulated: the link was paced, because this machine's own would leave "
        "next to nothing to hide.");
  }
  std::vector<std::string> charts;
  for (const RowGroup& group : GroupsOf(f)) charts.push_back(RowChart(group));
  page->Charts(charts);
  for (const RowGroup& group : GroupsOf(f)) {
    const double budget = NumberOf(group.rows[0], "budget_bytes");
    std::string caption = group.name;
    if (std::isfinite(budget)) caption += ", budget " + Mebibytes(budget) + " MiB";
    const Table lossy = LossyTable(group);
    const std::string which = lossy.num_rows() > 0 ? "all lossless rows" : "all rows";
    caption += SameOutput(group) ? ". Outputs of " + which + " are equal, bit for bit."
                                 : ". Outputs differ between rows or were not hashed.";
    page->AddTable(RowTable(group), caption);
    if (lossy.num_rows() > 0)
      page->AddTable(lossy,
                     group.name + ": what compressed experts change in the output");
  }
  page->Paragraph(
      "Tc is compute time, Tx transfer time when nothing is cached ahead; the bound "
      "(Tc+Tx)/max(Tc,Tx) is what perfect overlap could give over none.");
}

void SummariseRows(const RunFolder& f,
                   std::vector<std::pair<std::string, std::string>>* figures) {
  const bool replay = IsReplay(EntriesWith(f.results, "policy"));
  for (const RowGroup& group : GroupsOf(f)) {
    const Json* best = nullptr;
    for (const Json& row : group.rows) {
      const std::string predictor = TextOf(row, "predictor");
      const bool counts =
          !predictor.empty() && predictor != "none" && predictor != "oracle";
      if (counts && !IsLossy(row) &&
          (best == nullptr || NumberOf(row, "speed_up") > NumberOf(*best, "speed_up"))) {
        best = &row;
      }
    }
    if (best == nullptr || !std::isfinite(NumberOf(*best, "speed_up"))) continue;
    figures->push_back({std::string(replay ? "replay" : "generation") + ", " +
                            group.name + ": " + RowName(*best) +
                            " over on-demand LRU (bound " +
                            Fixed(NumberOf(*best, "bound"), 2) + ")",
                        Fixed(NumberOf(*best, "speed_up"), 2) + "x"});
  }
}

}  // namespace routecast
