#include "report/rows_section.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "report/result_values.h"
#include "report/row_charts.h"
#include "report/svg_chart.h"

namespace routecast {
namespace {

bool IsReplay(const std::vector<Json>& rows) {
  return std::any_of(rows.begin(), rows.end(),
                     [](const Json& row) { return FlagOf(row, "synthetic_weights"); });
}

std::string Mebibytes(double bytes) { return Fixed(bytes / (1 << 20), 1); }

Table RowTable(const RowGroup& group) {
  Table table({"<row", "tokens/s", "speed-up", "p50 ms", "p95 ms", "p99 ms", "hit rate %",
               "useful MiB", "late MiB", "wasted MiB", "stall s", "asking s", "aside s",
               "Tc s", "Tx s", "bound", "<output"});
  for (const Json& row : group.rows) {
    const std::string hash = TextOf(row, "output_sha256");
    table.AddRow({Labelled(row), Fixed(NumberOf(row, "tokens_per_second"), 1),
                  Fixed(NumberOf(row, "speed_up"), 2), Fixed(NumberOf(row, "p50_ms"), 2),
                  Fixed(NumberOf(row, "p95_ms"), 2), Fixed(NumberOf(row, "p99_ms"), 2),
                  Fixed(NumberOf(row, "hit_rate") * 100, 1),
                  Mebibytes(NumberOf(row, "bytes_useful")),
                  Mebibytes(NumberOf(row, "bytes_late")),
                  Mebibytes(NumberOf(row, "bytes_wasted")),
                  Fixed(NumberOf(row, "stall_seconds"), 2),
                  Fixed(NumberOf(row, "predictor_seconds"), 2),
                  Fixed(NumberOf(row, "predictor_aside_seconds"), 2),
                  Fixed(NumberOf(row, "compute_seconds"), 2),
                  Fixed(NumberOf(row, "transfer_seconds"), 2),
                  Fixed(NumberOf(row, "bound"), 2), hash.substr(0, 8)});
  }
  return table;
}

Table LossyTable(const RowGroup& group) {
  Table table({"<row", "speed-up", "bytes 1/", "weights off %", "texts equal %", "texts",
               "KL, nats", "perplexity %"});
  for (const Json& row : group.rows) {
    if (!IsLossy(row)) continue;
    table.AddRow(
        {Labelled(row), Fixed(NumberOf(row, "speed_up"), 2),
         Fixed(NumberOf(row, "compression_ratio"), 1),
         Fixed(100 * NumberOf(row, "weight_error") / NumberOf(row, "weight_scale"), 1),
         Fixed(100 * NumberOf(row, "exact_match"), 1),
         ShortNumber(NumberOf(row, "compared_sequences")),
         Fixed(NumberOf(row, "logit_kl"), 4),
         Fixed(100 * NumberOf(row, "perplexity_change"), 2)});
  }
  return table;
}

// A line a row and lead at which anything was foretold.
Table LeadTable(const std::vector<RowGroup>& groups) {
  Table table({"<row", "<of", "lead", "threshold", "foretold", "trust", "fetched", "used",
               "used %", "wasted MiB", "stall saved s"});
  for (const RowGroup& group : groups) {
    for (const Json& row : group.rows) {
      if (TextOf(row, "predictor") == "oracle") continue;  // right at every lead
      for (const Json& lead : EntriesWith(row.value("speculation", Json()), "lead")) {
        const double used = NumberOf(lead, "used"),
                     fetched = used + NumberOf(lead, "unused"),
                     threshold = NumberOf(lead, "threshold");
        const bool shut = std::isfinite(threshold) && !FlagOf(lead, "open");
        table.AddRow(
            {Labelled(row), group.name, ShortNumber(NumberOf(lead, "lead")),
             shut ? "shut" : Fixed(threshold, 2), ShortNumber(NumberOf(lead, "judged")),
             Fixed(NumberOf(lead, "trust"), 2), ShortNumber(fetched), ShortNumber(used),
             Fixed(fetched > 0 ? 100 * used / fetched : NAN, 1),
             Mebibytes(NumberOf(lead, "wasted_bytes")),
             Fixed(NumberOf(lead, "saved_seconds"), 2)});
      }
    }
  }
  return table;
}

void AddLeads(const std::vector<RowGroup>& groups, HtmlReport* page) {
  constexpr size_t kMostLines = 24;  // that are shown unfolded
  const Table table = LeadTable(groups);
  if (table.num_rows() == 0) return;
  const char* const caption =
      "What speculation was worth by lead (MoE layers between a prediction and its "
      "visit), warm-up rounds included";
  if (table.num_rows() > kMostLines) {
    page->Details(caption, table);
  } else {
    page->AddTable(table, caption);
  }
  page->Paragraph(
      "An expert is fetched where its predicted probability reaches the threshold, which "
      "follows from what fetching at that lead saved and cost; trust is how many of the "
      "foretold came, over the sum of their probabilities. Shut: nothing is fetched on "
      "that lead's word until it gets right more often.");
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
  const auto all_groups = [&](std::vector<std::string> (*charts_of)(const RowGroup&)) {
    std::vector<std::string> charts;
    for (const RowGroup& group : GroupsOf(f)) {
      for (std::string& chart : charts_of(group)) charts.push_back(std::move(chart));
    }
    return charts;
  };
  page->Charts(all_groups(SpeedCharts));
  if (const auto charts = BatchCharts(f); !charts.empty()) page->Charts(charts);
  page->FoldedCharts("More pictures: where the time goes, tails, prefetches, the link",
                     all_groups(DetailCharts));
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
  AddLeads(GroupsOf(f), page);
  page->Paragraph(
      "Asking is what questions to the predictor took of the forward pass, aside what "
      "answers took on a thread of their own. "
      "Tc is a row's own computing, Tx the time its transfers had the link. The bound "
      "(Tc+Tx)/max(Tc,Tx) takes Tc from the resident row and Tx from on-demand LRU: what "
      "overlap alone can give over it. A row that keeps better experts than LRU, as the "
      "oracle does, moves less and may pass it.");
}

void SummariseRows(const RunFolder& f,
                   std::vector<std::pair<std::string, std::string>>* figures) {
  const bool replay = IsReplay(EntriesWith(f.results, "policy"));
  for (const RowGroup& group : GroupsOf(f)) {
    const Json* best = nullptr;
    for (const Json& row : group.rows) {
      const std::string predictor = TextOf(row, "predictor");
      // What fetched nothing ahead, or was off, differs from on-demand LRU by chance.
      const bool counts = !predictor.empty() && predictor != "none" &&
                          predictor != "oracle" && !FlagOf(row, "switched_off") &&
                          NumberOf(row, "prefetch_recall") != 0;
      if (counts && !IsLossy(row) &&
          (best == nullptr || NumberOf(row, "speed_up") > NumberOf(*best, "speed_up"))) {
        best = &row;
      }
    }
    if (best == nullptr || !std::isfinite(NumberOf(*best, "speed_up"))) continue;
    std::string quartiles;
    const auto spread = best->find("speed_up_spread");
    if (spread != best->end() && spread->is_array() && spread->size() == 5 &&
        (*spread)[1].is_number() && (*spread)[3].is_number()) {
      const double low = (*spread)[1].get<double>(), high = (*spread)[3].get<double>();
      quartiles = ", quartiles " + Fixed(low, 2) + " to " + Fixed(high, 2);
      if (low <= 1) quartiles += ": not told apart";
    }
    figures->push_back({std::string(replay ? "replay" : "generation") + ", " +
                            group.name + ": " + RowName(*best) +
                            " over on-demand LRU (bound " +
                            Fixed(NumberOf(*best, "bound"), 2) + ")" + quartiles,
                        Fixed(NumberOf(*best, "speed_up"), 2) + "x"});
  }
}

}  // namespace routecast
