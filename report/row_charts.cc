#include "report/row_charts.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>
#include <limits>
#include <map>
#include <set>

#include "report/result_values.h"
#include "report/svg_chart.h"

namespace routecast {
namespace {

constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

std::string Titled(const std::string& what, const std::string& group) {
  return group.empty() ? what : what + ", " + group;
}

FiveValues FiveOf(const Json& row, const std::string& key) {
  FiveValues five;
  five.fill(kNone);
  const auto found = row.find(key);
  if (found == row.end() || !found->is_array() || found->size() != five.size())
    return five;
  for (size_t i = 0; i < five.size(); ++i) {
    if ((*found)[i].is_number()) five[i] = (*found)[i].get<double>();
  }
  return five;
}

// Bars of several keys of the rows, each value times `scale`.
struct BarKey {
  std::string name, key;
  double scale = 1;
};
void AddBars(const RowGroup& group, const std::string& title, const std::string& label,
             const std::vector<BarKey>& keys, std::vector<std::string>* charts) {
  BarChart chart{Titled(title, group.name), label, {}, {}, 0};
  bool any = false;
  for (const BarKey& key : keys) chart.series.push_back({key.name, {}, {}});
  for (const Json& row : group.rows) {
    chart.categories.push_back(Labelled(row));
    for (size_t i = 0; i < keys.size(); ++i) {
      const double value = NumberOf(row, keys[i].key) * keys[i].scale;
      chart.series[i].values.push_back(value);
      any = any || std::isfinite(value);
    }
  }
  if (any) charts->push_back(BarChartSvg(chart));
}

void AddBoxes(const RowGroup& group, const std::string& title, const std::string& label,
              const std::vector<BarKey>& keys, double reference,
              std::vector<std::string>* charts) {
  BoxChart chart;
  chart.title = Titled(title, group.name);
  chart.y_label = label;
  bool any = false;
  for (const BarKey& key : keys) chart.series.push_back({key.name, {}});
  for (const Json& row : group.rows) {
    chart.categories.push_back(Labelled(row));
    for (size_t i = 0; i < keys.size(); ++i) {
      chart.series[i].boxes.push_back(FiveOf(row, keys[i].key));
      any = any || std::isfinite(chart.series[i].boxes.back()[2]);
    }
  }
  chart.reference = reference;
  chart.reference_name = "bound";
  if (any) charts->push_back(BoxChartSvg(chart));
}

// Points of (x, y) by series, in the order of their names' first appearance.
class Lines {
 public:
  void Add(const std::string& name, double x, double y) {
    if (!std::isfinite(x) || !std::isfinite(y)) return;
    auto found = std::find_if(series_.begin(), series_.end(),
                              [&](const auto& s) { return s.first == name; });
    if (found == series_.end()) found = series_.insert(series_.end(), {name, {}});
    found->second[x] = y;
  }
  std::string Svg(const std::string& title, const std::string& x, const std::string& y,
                  bool whole_x) const {
    LineChart chart{title, x, y, {}, /*y_from_zero=*/true, whole_x};
    for (const auto& [name, points] : series_) {
      LineSeries line{name, {}, {}};
      for (const auto& [at, value] : points) {
        line.x.push_back(at);
        line.y.push_back(value);
      }
      chart.series.push_back(std::move(line));
    }
    return LineChartSvg(chart);
  }
  bool empty() const { return series_.empty(); }
  // Those of one run only say nothing of x; `kept` stays.
  void DropSingles(const std::string& kept) {
    std::erase_if(series_,
                  [&](const auto& s) { return s.second.size() < 2 && s.first != kept; });
  }
  // The largest y of every x and those before: what no row beats with less.
  void AddBest(const std::string& name) {
    std::map<double, double> best;
    for (const auto& [_, points] : series_) {
      for (const auto& [x, y] : points) {
        const auto at = best.emplace(x, y).first;
        at->second = std::max(at->second, y);
      }
    }
    double most = -INFINITY;
    for (auto& [x, y] : best) y = most = std::max(most, y);
    series_.push_back({name, std::move(best)});
  }

 private:
  std::vector<std::pair<std::string, std::map<double, double>>> series_;
};

// What rows that are compared with each other have in common, but for one key.
std::string GroupText(const Json& row, const std::string& without = "") {
  const double batch = NumberOf(row, "batch");
  std::string name = TextOf(row, "phase");
  const auto add = [&](const std::string& part) {
    name += (name.empty() ? "" : ", ") + part;
  };
  if (without != "batch" && std::isfinite(batch)) add("batch " + ShortNumber(batch));
  for (const char* key : {"prompts", "schedule", "budget"}) {
    const std::string value = TextOf(row, key);
    if (key != without && !value.empty() && value != "in_order") add(value);
  }
  return name;
}

}  // namespace

std::vector<RowGroup> GroupsOf(const RunFolder& folder) {
  return GroupsOf(EntriesWith(folder.results, "policy"));
}

std::vector<RowGroup> GroupsOf(const std::vector<Json>& rows) {
  std::vector<RowGroup> groups;
  for (const Json& row : rows) {
    const std::string name = GroupText(row);
    auto it = std::find_if(groups.begin(), groups.end(),
                           [&](const RowGroup& g) { return g.name == name; });
    if (it == groups.end()) it = groups.insert(groups.end(), {name, {}});
    it->rows.push_back(row);
  }
  return groups;
}

bool IsLossy(const Json& row) {
  const std::string copies = TextOf(row, "copies");
  return !copies.empty() && copies != "lossless";
}

std::string Labelled(const Json& row) {
  // A comparison may have a predictor's rows with several policies.
  const std::string policy = TextOf(row, "policy"), predictor = TextOf(row, "predictor");
  const bool named =
      !predictor.empty() && predictor != "none" && !policy.empty() && policy != "auto";
  // Nor has a simulation's one eviction alone.
  const std::string eviction = TextOf(row, "eviction");
  const bool kept = FlagOf(row, "simulated") && !predictor.empty() &&
                    predictor != "none" && !eviction.empty() && eviction != "lru";
  return RowName(row) + (named ? ", " + policy : "") + (kept ? ", " + eviction : "") +
         (IsLossy(row) ? ", LOSSY " + TextOf(row, "copies") : "");
}

std::vector<std::string> SpeedCharts(const RowGroup& group) {
  std::vector<std::string> charts;
  AddBars(group, "Tokens a second", "tokens/s", {{"median", "tokens_per_second"}},
          &charts);
  AddBoxes(group, "Rate over on-demand LRU by round", "ratio",
           {{"rounds", "speed_up_spread"}}, NumberOf(group.rows[0], "bound"), &charts);
  return charts;
}

std::vector<std::string> DetailCharts(const RowGroup& group) {
  std::vector<std::string> charts;
  AddBoxes(group, "Computing and waiting by round", "ms a token",
           {{"computing", "compute_ms_spread"}, {"waiting", "stall_ms_spread"}}, kNone,
           &charts);
  AddBars(group, "Tail of a step", "ms",
          {{"p50", "p50_ms"}, {"p95", "p95_ms"}, {"p99", "p99_ms"}}, &charts);
  AddBars(group, "What became of requests and prefetches", "%",
          {{"found ready", "hit_rate", 100},
           {"prefetches used", "prefetch_precision", 100},
           {"used and in time", "prefetch_timely", 100},
           {"needed and prefetched", "prefetch_recall", 100}},
          &charts);
  AddBars(group, "Use of the link, and what asking takes", "% of the time",
          {{"link", "link_share", 100}, {"asking", "predictor_share", 100}}, &charts);
  // One point a row: what no cheaper predictor beats is the front.
  Lines cost;
  for (const Json& row : group.rows) {
    if (IsLossy(row) || TextOf(row, "policy") == "resident") continue;
    if (TextOf(row, "predictor") == "oracle") continue;  // nobody can have it
    cost.Add(Labelled(row), NumberOf(row, "predictor_share") * 100,
             NumberOf(row, "speed_up"));
  }
  if (!cost.empty()) {
    cost.AddBest("best of all");
    charts.push_back(cost.Svg(Titled("Speed against what asking takes", group.name),
                              "asking, % of the time", "ratio to on-demand LRU", false));
  }
  return charts;
}

std::vector<std::string> BatchCharts(const RunFolder& folder) {
  struct Picture {
    const char *title, *y, *key;
    double scale;
  };
  static constexpr Picture kPictures[] = {
      {"Speed by batch", "tokens/s", "tokens_per_second", 1},
      {"Rate over on-demand LRU by batch", "ratio", "speed_up", 1},
      {"Effect size by batch", "(ratio - 1) / deviation", "effect_size", 1},
      {"Hits by batch", "%", "hit_rate", 100},
      {"Step by batch", "ms, median", "p50_ms", 1},
      {"Tail of a step by batch", "ms, p99", "p99_ms", 1},
      {"Memory by batch", "MiB held", "held_bytes_peak", 1.0 / (1 << 20)}};
  struct Charts {
    std::set<double> batches;
    std::array<Lines, std::size(kPictures)> lines;
  };
  std::map<std::string, Charts> by_group;
  for (const Json& row : EntriesWith(folder.results, "policy")) {
    Charts& charts = by_group[GroupText(row, "batch")];
    const double batch = NumberOf(row, "batch");
    charts.batches.insert(batch);
    for (size_t i = 0; i < charts.lines.size(); ++i) {
      const Picture& picture = kPictures[i];
      charts.lines[i].Add(Labelled(row), batch,
                          NumberOf(row, picture.key) * picture.scale);
    }
  }
  std::vector<std::string> svg;
  for (const auto& [name, charts] : by_group) {
    if (charts.batches.size() < 2) continue;
    for (size_t i = 0; i < charts.lines.size(); ++i) {
      if (charts.lines[i].empty()) continue;
      svg.push_back(charts.lines[i].Svg(Titled(kPictures[i].title, name),
                                        "sequences together", kPictures[i].y, true));
    }
  }
  return svg;
}

std::vector<std::string> MemoryCharts(const std::vector<RunFolder>& folders) {
  struct Charts {
    std::set<double> budgets;
    Lines speed, hits;
  };
  std::map<std::string, Charts> by_group;
  for (const RunFolder& folder : folders) {
    for (const Json& row : EntriesWith(folder.results, "policy")) {
      const bool replay = FlagOf(row, "synthetic_weights");
      Charts& charts = by_group[std::string(replay ? "replay, " : "generation, ") +
                                GroupText(row, "budget")];
      const double mebibytes = NumberOf(row, "budget_bytes") / (1 << 20);
      if (TextOf(row, "policy") != "resident") charts.budgets.insert(mebibytes);
      charts.speed.Add(Labelled(row), mebibytes, NumberOf(row, "tokens_per_second"));
      charts.hits.Add(Labelled(row), mebibytes, NumberOf(row, "hit_rate") * 100);
    }
  }
  std::vector<std::string> svg;
  for (auto& [name, charts] : by_group) {
    if (charts.budgets.size() < 2) continue;
    charts.speed.AddBest("best of all");
    charts.speed.DropSingles("resident");
    charts.hits.DropSingles("resident");
    svg.push_back(
        charts.speed.Svg(Titled("Speed by memory", name), "MiB", "tokens/s", false));
    svg.push_back(charts.hits.Svg(Titled("Hits by memory", name), "MiB", "%", false));
  }
  return svg;
}

std::vector<std::string> SimulationCharts(const std::vector<RowGroup>& budgets) {
  std::vector<std::string> svg;
  if (budgets.size() == 1) {
    AddBars(budgets[0], "Simulated rate over on-demand LRU", "ratio",
            {{"simulated", "speed_up"}}, &svg);
    AddBars(budgets[0], "What was moved", "MiB",
            {{"useful", "bytes_useful", 1.0 / (1 << 20)},
             {"late", "bytes_late", 1.0 / (1 << 20)},
             {"wasted", "bytes_wasted", 1.0 / (1 << 20)}},
            &svg);
    return svg;
  }
  Lines rates, speed, hits, bytes;
  for (const RowGroup& budget : budgets) {
    // Its own memory holds all experts where everything stays.
    const double mebibytes = NumberOf(budget.rows[0], "budget_bytes") / (1 << 20);
    for (const Json& row : budget.rows) {
      const std::string name = Labelled(row);
      rates.Add(name, mebibytes, NumberOf(row, "tokens_per_second"));
      // Far above all others where little memory is left.
      if (TextOf(row, "policy") == "resident") continue;
      speed.Add(name, mebibytes, NumberOf(row, "speed_up"));
      hits.Add(name, mebibytes, NumberOf(row, "hit_rate") * 100);
      bytes.Add(name, mebibytes,
                (NumberOf(row, "bytes_useful") + NumberOf(row, "bytes_late") +
                 NumberOf(row, "bytes_wasted")) /
                    (1 << 30));
    }
  }
  const char* const memory = "MiB of experts";
  svg.push_back(
      rates.Svg("Simulated tokens a second by memory", memory, "tokens/s", false));
  svg.push_back(
      speed.Svg("Simulated rate over on-demand LRU by memory", memory, "ratio", false));
  svg.push_back(hits.Svg("Simulated hits by memory", memory, "%", false));
  svg.push_back(bytes.Svg("Bytes moved by memory", memory, "GiB", false));
  return svg;
}

}  // namespace routecast
