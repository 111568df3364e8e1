#include "report/evaluation_report.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "report/accuracy_section.h"
#include "report/html_report.h"
#include "report/result_values.h"
#include "report/row_charts.h"
#include "report/rows_section.h"
#include "report/simulation_section.h"
#include "report/svg_chart.h"

namespace routecast {
namespace {

constexpr size_t kCurvePoints = 400;

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

void AddPretraining(const std::vector<RunFolder>& folders, HtmlReport* page) {
  Table table({"<checkpoint", "<stack", "loss, nats", "random routing costs, nats",
               "least load entropy", "mean gate"});
  for (const RunFolder& f : folders) {
    if (!f.pretrain.is_object() || !f.pretrain.contains("test")) continue;
    const Json& test = f.pretrain["test"];
    for (const auto& [stack, loss] :
         {std::pair{"encoder", "masked_loss"}, std::pair{"decoder", "span_loss"}}) {
      if (!test.is_object() || !test.contains(stack)) continue;
      const Json& measures = test[stack];
      table.AddRow({f.name, stack, Fixed(NumberOf(test, loss), 3),
                    Fixed(NumberOf(measures, "random_routing_costs_nats"), 3),
                    Fixed(NumberOf(measures, "load_entropy"), 3),
                    Fixed(NumberOf(measures, "mean_gate"), 3)});
    }
  }
  if (table.num_rows() == 0) return;
  page->Section("Is the routing worth learning?");
  page->AddTable(table,
                 "Held-out text: what random experts would cost (masked tokens in the "
                 "encoder, spans in the decoder); load entropy 1 = every expert equally "
                 "busy");
}

void AddSummary(const std::vector<RunFolder>& folders, HtmlReport* page) {
  std::vector<std::pair<std::string, std::string>> figures;
  SummariseAccuracy(folders, &figures);
  for (const RunFolder& f : folders) {
    if (IsEvaluation(f)) SummariseRows(f, &figures);
    if (IsSimulation(f)) SummariseSimulation(f, &figures);
  }
  if (!figures.empty()) page->KeyFigures(figures);
}

// What the first evaluation ran, on what.
std::string Subtitle(const std::vector<RunFolder>& folders) {
  for (const RunFolder& f : folders) {
    const std::string device = TextOf(f.results, "device");
    const bool simulation = device.empty() && IsSimulation(f);
    if (device.empty() && !simulation) continue;
    std::string text = simulation ? "simulated" : "device " + device;
    if (!f.run.is_object() || !f.run.contains("configuration")) return text;
    const Json& flags = f.run["configuration"];
    std::vector<const char*> told = {"model", "store", "predictor", "dtype", "link"};
    if (simulation) told = {"profile", "store", "predictor"};
    for (const char* flag : told) {
      const std::string value = TextOf(flags, flag);
      if (!value.empty()) text += std::string(", ") + flag + " " + value;
    }
    const double rounds = NumberOf(flags, "rounds");
    if (!simulation && std::isfinite(rounds)) text += ", " + Fixed(rounds, 0) + " rounds";
    return text;
  }
  return "routing, prediction, prefetching";
}

}  // namespace

std::string EvaluationReportHtml(const std::vector<RunFolder>& folders) {
  HtmlReport page("Routecast report", Subtitle(folders));
  AddSummary(folders, &page);
  for (const RunFolder& f : folders) {
    if (IsEvaluation(f)) AddRows(f, &page);
    if (IsSimulation(f)) AddSimulation(f, &page);
  }
  if (const auto charts = MemoryCharts(folders); !charts.empty()) {
    page.Section("Speed against memory");
    page.Charts(charts);
  }
  AddAccuracy(folders, &page);
  AddLoad(folders, &page);
  AddPretraining(folders, &page);
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
