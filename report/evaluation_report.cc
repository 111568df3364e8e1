#include "report/evaluation_report.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <set>
#include <sstream>

#include "common/errors.h"
#include "report/html_report.h"
#include "report/result_values.h"
#include "report/svg_chart.h"

namespace routecast {
namespace {

constexpr size_t kCurvePoints = 400;
constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

bool IsEvaluation(const RunFolder& f) {
  return !EntriesWith(f.results, "policy").empty();
}
bool IsTraining(const RunFolder& f) {
  return f.results.is_object() && f.results.contains("scores");
}
bool IsReplay(const std::vector<Json>& rows) {
  return std::any_of(rows.begin(), rows.end(),
                     [](const Json& row) { return FlagOf(row, "synthetic_weights"); });
}

double Mean(const std::vector<double>& values) {
  double sum = 0;
  int count = 0;
  for (double v : values) {
    if (std::isfinite(v)) sum += v, ++count;
  }
  return count > 0 ? sum / count : kNone;
}

// ---- accuracy
// --------------------------------------------------------------------------------

struct Place {  // where a prediction was made for
  std::string phase;
  int lead = 0, layer = 0;
  auto operator<=>(const Place&) const = default;
};
struct Score {
  double top1 = kNone, top2 = kNone, top4 = kNone, half_width = kNone;
  double target = kNone;  // the layer that is predicted; Place::layer is where from
};
using Scores = std::map<Place, Score>;

Scores ScoresOf(const Json& entries) {
  Scores scores;
  for (const Json& e : EntriesWith(entries, "top1")) {
    const double lead = NumberOf(e, "lead"), layer = NumberOf(e, "layer");
    if (!std::isfinite(lead) || !std::isfinite(layer)) continue;
    scores[{TextOf(e, "phase"), static_cast<int>(lead), static_cast<int>(layer)}] = {
        NumberOf(e, "top1"), NumberOf(e, "top2"), NumberOf(e, "top4"),
        HalfWidthOf(e, "ci95"), NumberOf(e, "target")};
  }
  return scores;
}

// Learned models first, in the order of the folders; then baselines, each once.
struct Predictors {
  std::vector<std::pair<std::string, Scores>> all;
  size_t num_learned = 0;
};

Predictors PredictorsOf(const std::vector<RunFolder>& folders) {
  Predictors found;
  std::set<std::string> seen;
  for (const RunFolder& f : folders) {
    if (!IsTraining(f)) continue;
    const std::string kind = TextOf(f.results, "kind");
    found.all.emplace_back(kind.empty() ? f.name : kind, ScoresOf(f.results["scores"]));
  }
  found.num_learned = found.all.size();
  for (const RunFolder& f : folders) {
    if (!IsTraining(f) || !f.results.contains("baselines")) continue;
    if (!f.results["baselines"].is_object()) continue;
    for (const auto& [name, entries] : f.results["baselines"].items()) {
      if (seen.insert(name).second) found.all.emplace_back(name, ScoresOf(entries));
    }
  }
  return found;
}

// Leads of each phase; the encoder first, as a text meets it first.
std::map<std::string, std::set<int>, std::greater<>> LeadsOfPhases(
    const Predictors& predictors) {
  std::map<std::string, std::set<int>, std::greater<>> found;
  for (size_t p = 0; p < predictors.num_learned; ++p) {
    for (const auto& [place, score] : predictors.all[p].second) {
      found[place.phase].insert(place.lead);
    }
  }
  return found;
}

std::string AccuracyByLayer(const Predictors& predictors, const std::string& phase,
                            int lead) {
  std::map<int, double> layers;  // where from -> target
  for (const auto& [name, scores] : predictors.all) {
    for (const auto& [place, score] : scores) {
      if (place.phase == phase && place.lead == lead) layers[place.layer] = score.target;
    }
  }
  BarChart chart{
      phase + ", lead " + std::to_string(lead), "top-1 accuracy, %", {}, {}, 100};
  for (const auto& [layer, target] : layers) {
    chart.categories.push_back(
        "layer " + (std::isfinite(target) ? ShortNumber(target) : std::to_string(layer)));
  }
  for (const auto& [name, scores] : predictors.all) {
    BarSeries series{name, {}, {}};
    for (const auto& [layer, target] : layers) {
      const auto it = scores.find({phase, lead, layer});
      const Score score = it == scores.end() ? Score{} : it->second;
      series.values.push_back(score.top1 * 100);
      series.half_width.push_back(score.half_width * 100);
    }
    chart.series.push_back(std::move(series));
  }
  return BarChartSvg(chart);
}

std::string AccuracyByLead(const Predictors& predictors, const std::string& phase) {
  LineChart chart{phase + ": mean over layers",
                  "lead (MoE layers ahead)",
                  "top-1 accuracy, %",
                  {},
                  true,
                  true};
  for (const auto& [name, scores] : predictors.all) {
    std::map<int, std::vector<double>> by_lead;
    for (const auto& [place, score] : scores) {
      if (place.phase == phase) by_lead[place.lead].push_back(score.top1 * 100);
    }
    LineSeries series{name, {}, {}};
    for (const auto& [lead, values] : by_lead) {
      series.x.push_back(lead);
      series.y.push_back(Mean(values));
    }
    chart.series.push_back(std::move(series));
  }
  return LineChartSvg(chart);
}

Table AccuracyTable(const Predictors& predictors) {
  Table table({"<phase", "lead", "routed up to", "layer", "<predictor", "top-1 %", "+-",
               "top-2 %", "top-4 %"});
  std::set<Place> places;
  for (const auto& [name, scores] : predictors.all) {
    for (const auto& [place, score] : scores) places.insert(place);
  }
  for (const Place& place : places) {
    for (const auto& [name, scores] : predictors.all) {
      const auto it = scores.find(place);
      if (it == scores.end()) continue;
      const Score& s = it->second;
      table.AddRow({place.phase, std::to_string(place.lead),
                    place.layer < 0 ? "none" : std::to_string(place.layer),
                    ShortNumber(s.target), name, Fixed(s.top1 * 100, 1),
                    Fixed(s.half_width * 100, 1), Fixed(s.top2 * 100, 1),
                    Fixed(s.top4 * 100, 1)});
    }
  }
  return table;
}

void AddAccuracy(const Predictors& predictors, HtmlReport* page) {
  if (predictors.num_learned == 0) return;
  page->Section("Prediction accuracy on test documents");
  page->Paragraph(
      "How often the first guess is the expert that the router then chose. Learned "
      "models come first, then baselines; bars carry 95 % intervals. A lead of n "
      "asks for the n-th MoE layer beyond those already routed; in the decoder, leads "
      "beyond the last "
      "layer ask for the next token.");
  std::vector<std::string> by_layer, by_lead;
  constexpr size_t kMostLeads = 4;  // a phase; the table below has every lead
  for (const auto& [phase, leads] : LeadsOfPhases(predictors)) {
    by_lead.push_back(AccuracyByLead(predictors, phase));
    size_t shown = 0;
    for (int lead : leads) {
      if (shown++ < kMostLeads)
        by_layer.push_back(AccuracyByLayer(predictors, phase, lead));
    }
  }
  page->Charts(by_lead);
  page->Charts(by_layer);
  page->Details("All scores", AccuracyTable(predictors));
}

// ---- expert load
// -----------------------------------------------------------------------------

void AddLoad(const std::vector<RunFolder>& folders, HtmlReport* page) {
  for (const RunFolder& f : folders) {
    const std::vector<Json> layers = EntriesWith(f.stats, "load");
    if (layers.empty()) continue;
    HeatMap map{
        "Tokens an expert gets", "expert", "tokens, 1 = even share", {}, {}, 0, 2};
    Table table({"<phase", "layer", "entropy, bits", "given the layer before, bits",
                 "dropped %", "busiest expert"});
    for (const Json& layer : layers) {
      if (!layer["load"].is_array()) continue;
      std::vector<double> load;
      for (const Json& v : layer["load"])
        load.push_back(v.is_number() ? v.get<double>() : 0);
      const double sum = std::accumulate(load.begin(), load.end(), 0.0);
      if (sum <= 0) continue;
      double most = 0;
      for (double& v : load) {
        v *= static_cast<double>(load.size()) / sum;
        most = std::max(most, v);
      }
      const std::string number = ShortNumber(NumberOf(layer, "layer"));
      map.rows.push_back(TextOf(layer, "phase") + " " + number);
      map.values.push_back(std::move(load));
      table.AddRow(
          {TextOf(layer, "phase"), number, Fixed(NumberOf(layer, "entropy_bits"), 2),
           Fixed(NumberOf(layer, "conditional_entropy_bits"), 2),
           Fixed(NumberOf(layer, "dropped") * 100, 2), Fixed(most, 2) + "x even"});
    }
    page->Section("Expert load");
    page->Charts({HeatMapSvg(map)});
    page->AddTable(table, "Routing of the recorded store, by MoE layer");
    return;  // one store a report
  }
}

// ---- loss curves
// -----------------------------------------------------------------------------

LineSeries Curve(const RunFolder& f, const std::string& key, const std::string& name) {
  LineSeries curve{name, {}, {}};
  for (const Json& line : f.metrics) {
    const double step = NumberOf(line, "step"), value = NumberOf(line, key);
    if (!std::isfinite(step) || !std::isfinite(value)) continue;
    curve.x.push_back(step);
    curve.y.push_back(value);
  }
  return Thinned(curve, kCurvePoints);
}

void AddCurves(const std::vector<RunFolder>& folders, HtmlReport* page) {
  std::vector<std::string> charts;
  for (const RunFolder& f : folders) {
    if (f.metrics.empty()) continue;
    const std::string kind = TextOf(f.results, "kind");
    const std::string what = IsTraining(f)
                                 ? "training of " + (kind.empty() ? f.name : kind)
                                 : "pre-training (" + f.name + ")";
    LineChart chart{"Loss, " + what, "step", "nats", {}, false};
    for (const auto& [key, name] : {std::pair{"train_loss", "training batches"},
                                    std::pair{"valid_loss", "validation documents"}}) {
      LineSeries curve = Curve(f, key, name);
      if (!curve.x.empty()) chart.series.push_back(std::move(curve));
    }
    if (!chart.series.empty()) charts.push_back(LineChartSvg(chart));
  }
  if (charts.empty()) return;
  page->Section("Loss curves");
  page->Charts(charts);
}

// ---- rows of evaluations
// ---------------------------------------------------------------------

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
    auto it = std::find_if(groups.begin(), groups.end(),
                           [&](const RowGroup& g) { return g.name == name; });
    if (it == groups.end()) it = groups.insert(groups.end(), {name, {}});
    it->rows.push_back(row);
  }
  return groups;
}

std::string Mebibytes(double bytes) { return Fixed(bytes / (1 << 20), 1); }

Table RowTable(const RowGroup& group) {
  Table table({"<row", "tokens/s", "speed-up", "p50 ms", "p95 ms", "hit rate %",
               "useful MiB", "late MiB", "wasted MiB", "stall s", "Tc s", "Tx s", "bound",
               "<output"});
  for (const Json& row : group.rows) {
    const std::string hash = TextOf(row, "output_sha256");
    table.AddRow(
        {RowName(row), Fixed(NumberOf(row, "tokens_per_second"), 1),
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

std::string RowChart(const RowGroup& group) {
  BarChart chart{"Tokens a second" + (group.name.empty() ? "" : ", " + group.name),
                 "tokens/s",
                 {},
                 {{"median", {}, {}}},
                 0};
  for (const Json& row : group.rows) {
    chart.categories.push_back(RowName(row));
    chart.series[0].values.push_back(NumberOf(row, "tokens_per_second"));
  }
  return BarChartSvg(chart);
}

bool SameOutput(const RowGroup& group) {
  std::set<std::string> hashes;
  for (const Json& row : group.rows) hashes.insert(TextOf(row, "output_sha256"));
  return hashes.size() == 1 && !hashes.begin()->empty();
}

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
    caption += SameOutput(group) ? ". Outputs of all rows are equal, bit for bit."
                                 : ". Outputs differ between rows or were not hashed.";
    page->AddTable(RowTable(group), caption);
  }
  page->Paragraph(
      "Tc is compute time, Tx transfer time when nothing is cached ahead; the bound "
      "(Tc+Tx)/max(Tc,Tx) is what perfect overlap could give over none.");
}

// ---- summary
// ---------------------------------------------------------------------------------

using KeyFigures = std::vector<std::pair<std::string, std::string>>;

void SummariseRows(const RunFolder& f, KeyFigures* figures) {
  const bool replay = IsReplay(EntriesWith(f.results, "policy"));
  for (const RowGroup& group : GroupsOf(f)) {
    const Json* best = nullptr;
    for (const Json& row : group.rows) {
      const std::string predictor = TextOf(row, "predictor");
      const bool counts =
          !predictor.empty() && predictor != "none" && predictor != "oracle";
      if (counts && (best == nullptr ||
                     NumberOf(row, "speed_up") > NumberOf(*best, "speed_up"))) {
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

void AddSummary(const std::vector<RunFolder>& folders, const Predictors& predictors,
                HtmlReport* page) {
  KeyFigures figures;
  double best_baseline = 0;
  std::string baseline_name;
  for (size_t p = 0; p < predictors.all.size(); ++p) {
    std::vector<double> nearest;  // lead 1, where every baseline has something to say
    for (const auto& [place, score] : predictors.all[p].second) {
      if (place.lead == 1) nearest.push_back(score.top1);
    }
    const double mean = Mean(nearest);
    if (!std::isfinite(mean)) continue;
    if (p < predictors.num_learned) {
      figures.push_back(
          {predictors.all[p].first + ": next MoE layer's expert, top-1", Percent(mean)});
    } else if (mean > best_baseline) {
      best_baseline = mean;
      baseline_name = predictors.all[p].first;
    }
  }
  if (!baseline_name.empty()) {
    figures.push_back({"best baseline (" + baseline_name + ")", Percent(best_baseline)});
  }
  for (const RunFolder& f : folders) {
    if (IsEvaluation(f)) SummariseRows(f, &figures);
  }
  if (!figures.empty()) page->KeyFigures(figures);
}

std::string DeviceText(const std::vector<RunFolder>& folders) {
  for (const RunFolder& f : folders) {
    const std::string device = TextOf(f.results, "device");
    if (!device.empty()) return "device " + device;
  }
  return "routing, prediction, prefetching";
}

}  // namespace

RunFolder LoadRunFolder(const fs::path& path) {
  if (!fs::is_directory(path)) {
    throw UsageError(ErrorText(path.string() + " is not a folder", "", "check the path"));
  }
  const fs::path whole = fs::absolute(path).lexically_normal();
  RunFolder folder;
  folder.name = (whole.has_filename() ? whole : whole.parent_path()).filename().string();
  if (fs::exists(path / "results.json"))
    folder.results = ReadJsonFile(path / "results.json");
  if (fs::exists(path / "stats.json")) folder.stats = ReadJsonFile(path / "stats.json");
  if (!fs::exists(path / "metrics.jsonl")) return folder;
  std::istringstream lines(ReadFile(path / "metrics.jsonl"));
  std::string line;
  while (std::getline(lines, line)) {
    if (line.empty() || lines.eof())
      continue;  // no newline yet: the line is being written
    folder.metrics.push_back(ParseJson(line, (path / "metrics.jsonl").string()));
  }
  return folder;
}

std::string EvaluationReportHtml(const std::vector<RunFolder>& folders) {
  HtmlReport page("Routecast report", DeviceText(folders));
  const Predictors predictors = PredictorsOf(folders);
  AddSummary(folders, predictors, &page);
  for (const RunFolder& f : folders) {
    if (IsEvaluation(f)) AddRows(f, &page);
  }
  AddAccuracy(predictors, &page);
  AddLoad(folders, &page);
  AddCurves(folders, &page);
  return page.Finish();
}

void WriteEvaluationReport(const fs::path& html, const std::vector<fs::path>& folders) {
  std::vector<RunFolder> loaded;
  for (const fs::path& folder : folders) {
    if (fs::exists(folder)) loaded.push_back(LoadRunFolder(folder));
  }
  WriteFileAtomic(html, EvaluationReportHtml(loaded));
}

}  // namespace routecast
