#include "report/accuracy_section.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <set>

#include "report/result_values.h"
#include "report/svg_chart.h"

namespace routecast {
namespace {

constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

double Mean(const std::vector<double>& values) {
  double sum = 0;
  int count = 0;
  for (double v : values) {
    if (std::isfinite(v)) sum += v, ++count;
  }
  return count > 0 ? sum / count : kNone;
}

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

// Of a phase that has a chart by layer each: bars with intervals take 400 bytes, and the
// table below has every lead.
size_t LeadsShown(const Predictors& predictors, const std::string& phase) {
  constexpr size_t kMostLeads = 4, kMostBars = 1000;
  size_t bars = 1;  // of a chart
  for (const auto& [name, scores] : predictors.all) {
    for (const auto& [place, score] : scores) {
      bars += place.phase == phase && place.lead == 1;
    }
  }
  return std::clamp<size_t>(kMostBars / bars, 1, kMostLeads);
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

}  // namespace

void AddAccuracy(const std::vector<RunFolder>& folders, HtmlReport* page) {
  const Predictors predictors = PredictorsOf(folders);
  if (predictors.num_learned == 0) return;
  page->Section("Prediction accuracy on test documents");
  page->Paragraph(
      "How often the first guess is the expert that the router then chose. Learned "
      "models come first, then baselines; bars carry 95 % intervals. A lead of n "
      "asks for the n-th MoE layer beyond those already routed; in the decoder, leads "
      "beyond the last "
      "layer ask for the next token.");
  std::vector<std::string> by_layer, by_lead;
  for (const auto& [phase, leads] : LeadsOfPhases(predictors)) {
    by_lead.push_back(AccuracyByLead(predictors, phase));
    const size_t most = LeadsShown(predictors, phase);
    size_t shown = 0;
    for (int lead : leads) {
      if (shown++ < most) by_layer.push_back(AccuracyByLayer(predictors, phase, lead));
    }
  }
  page->Charts(by_lead);
  page->Charts(by_layer);
  page->Details("All scores", AccuracyTable(predictors));
}

void SummariseAccuracy(const std::vector<RunFolder>& folders,
                       std::vector<std::pair<std::string, std::string>>* figures) {
  const Predictors predictors = PredictorsOf(folders);
  std::map<Place, double> best;  // the best baseline of each place at lead 1
  for (size_t p = 0; p < predictors.all.size(); ++p) {
    std::vector<double> nearest;
    for (const auto& [place, score] : predictors.all[p].second) {
      if (place.lead != 1 || !std::isfinite(score.top1)) continue;
      nearest.push_back(score.top1);
      if (p >= predictors.num_learned) best[place] = std::max(best[place], score.top1);
    }
    if (p < predictors.num_learned && !nearest.empty()) {
      figures->push_back({predictors.all[p].first + ": next MoE layer's expert, top-1",
                          Percent(Mean(nearest))});
    }
  }
  std::vector<double> baselines;
  for (const auto& [place, top1] : best) baselines.push_back(top1);
  if (!baselines.empty()) {
    figures->push_back({"the best baseline of each layer", Percent(Mean(baselines))});
  }
}

}  // namespace routecast
