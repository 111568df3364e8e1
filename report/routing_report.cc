#include "report/routing_report.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "report/heat_image.h"
#include "report/html_report.h"
#include "report/result_values.h"
#include "report/svg_chart.h"

namespace routecast {
namespace {

constexpr size_t kMostCells = 128;                     // a side of a transition map
constexpr double kLeastLoadEnd = 2, kMostLoadEnd = 8;  // of its colours, even shares
constexpr size_t kDrawnPaths = 7;  // a colour and dash of its own each
constexpr size_t kTablePaths = 15;

std::string LayerName(const Json& layer) {
  return TextOf(layer, "phase") + " " + ShortNumber(NumberOf(layer, "layer"));
}

std::vector<double> NumbersOf(const Json& object, const std::string& key) {
  std::vector<double> numbers;
  if (!object.is_object() || !object.contains(key) || !object[key].is_array()) return {};
  for (const Json& v : object[key])
    numbers.push_back(v.is_number() ? v.get<double>() : NAN);
  return numbers;
}

std::string ExpertsText(const Json& path) {
  std::string text;
  for (const double e : NumbersOf(path, "experts")) {
    text += (text.empty() ? "" : " > ") + Fixed(e, 0);
  }
  return text;
}

// `layers` are those with tokens, of `all`.
void AddKeyFigures(const Json& stats, const std::vector<Json>& layers, size_t all,
                   HtmlReport* page) {
  double entropy = 0;
  for (const Json& layer : layers) entropy += NumberOf(layer, "entropy_bits");
  const auto experts = layers.empty() ? 0 : NumbersOf(layers[0], "load").size();
  page->KeyFigures(
      {{"sequences", ShortNumber(NumberOf(stats, "sequences"))},
       {"encoder tokens", ShortNumber(NumberOf(stats, "encoder_tokens"))},
       {"decoder tokens", ShortNumber(NumberOf(stats, "decoder_tokens"))},
       {"MoE layers", std::to_string(all)},
       {"experts a layer", std::to_string(experts)},
       {"mean entropy of " +
            Fixed(std::log2(static_cast<double>(std::max<size_t>(1, experts))), 2) +
            " bits",
        Fixed(layers.empty() ? NAN : entropy / static_cast<double>(layers.size()), 2)}});
}

// Layers that tokens went through: of a stack that was not run there is nothing to show.
std::vector<Json> WithTokens(std::vector<Json> layers) {
  std::erase_if(layers, [](const Json& l) { return NumberOf(l, "tokens") == 0; });
  return layers;
}

void AddWithoutTokens(const std::vector<Json>& layers, HtmlReport* page) {
  std::string names;
  for (const Json& layer : layers) {
    if (NumberOf(layer, "tokens") == 0)
      names += (names.empty() ? "" : ", ") + LayerName(layer);
  }
  if (!names.empty()) page->Paragraph("Layers without tokens, not shown: " + names + ".");
}

// What is counted, and of which choices of the router.
void AddAbout(const Json& stats, HtmlReport* page) {
  const Json split = stats.value("split", Json::object());
  std::string text = TextOf(stats, "model");
  if (!text.empty()) text = "Model " + text + ". ";
  if (!split.empty()) {
    text += "All parts of the split are counted: ";
    const char* comma = "";
    for (const char* part : {"train", "validation", "test"}) {
      text += comma + ShortNumber(NumberOf(split, part)) + " " + part;
      comma = ", ";
    }
    text += " sequences. ";
  }
  const double k = NumberOf(stats, "experts_per_token");
  if (k > 1) {
    text += "A token uses " + Fixed(k, 0) +
            " experts: the picture of the load and what the token before used count all "
            "of them where all are stored; all else is of the first choice, the most "
            "probable one.";
  }
  if (!text.empty()) page->Paragraph(text);
}

void AddLoad(const std::vector<Json>& layers, HtmlReport* page) {
  HeatMap map{"Tokens an expert gets", "expert", "", {}, {}, 0, kLeastLoadEnd};
  double largest = 0;
  for (const Json& layer : layers) {
    std::vector<double> load = NumbersOf(layer, "slot_load");
    if (!load.empty()) map.title = "Uses of an expert, by all experts of a token";
    if (load.empty()) load = NumbersOf(layer, "load");
    if (load.empty()) continue;
    for (double& v : load) {
      v *= static_cast<double>(load.size());
      largest = std::max(largest, v);
    }
    map.rows.push_back(LayerName(layer));
    map.values.push_back(std::move(load));
  }
  if (map.values.empty()) return;
  // One expert that takes all would leave the others without a colour to tell apart.
  map.high = std::clamp(std::ceil(largest), kLeastLoadEnd, kMostLoadEnd);
  map.legend = "1 = even share, most " + Fixed(largest, 1);
  page->Section("Load");
  page->Charts({HeatMapSvg(map)});
}

// A series a phase over the layers of its stack.
LineChart AcrossLayers(const std::vector<Json>& layers, const std::string& title,
                       const std::string& unit,
                       const std::vector<std::pair<std::string, std::string>>& keys) {
  LineChart chart{title, "MoE layer of the stack", unit, {}, true, true};
  for (const char* phase : {"encoder", "decoder"}) {
    for (const auto& [key, name] : keys) {
      LineSeries line{std::string(phase) + ": " + name, {}, {}};
      for (const Json& layer : layers) {
        if (TextOf(layer, "phase") != phase) continue;
        const Json& from = layer.contains(key) ? layer : layer.value("spread", Json());
        const double y = NumberOf(from, key);
        if (!std::isfinite(y)) continue;
        line.x.push_back(NumberOf(layer, "layer"));
        line.y.push_back(y);
      }
      if (!line.x.empty()) chart.series.push_back(std::move(line));
    }
  }
  return chart;
}

void AddSpread(const std::vector<Json>& layers, HtmlReport* page) {
  if (layers.empty()) return;
  Table table({"<layer", "mean", "deviation", "CV", "skewness", "kurtosis", "min", "p25",
               "median", "p75", "IQR", "max", "active", "zero", "diversity", "dropped %",
               "tokens"});
  for (const Json& layer : layers) {
    const Json s = layer.value("spread", Json::object());
    std::vector<std::string> cells = {LayerName(layer)};
    for (const char* key : {"mean", "deviation"})
      cells.push_back(ShortNumber(NumberOf(s, key)));
    for (const char* key : {"cv", "skewness", "kurtosis"}) {
      cells.push_back(Fixed(NumberOf(s, key), 2));
    }
    for (const char* key :
         {"min", "q1", "median", "q3", "iqr", "max", "active", "zero"}) {
      cells.push_back(ShortNumber(NumberOf(s, key)));
    }
    cells.push_back(Fixed(NumberOf(s, "diversity"), 3));
    cells.push_back(Fixed(100 * NumberOf(layer, "dropped"), 2));
    cells.push_back(ShortNumber(NumberOf(s, "total")));
    table.AddRow(cells);
  }
  // Of a store without token ids the token before stands for the token.
  const bool tokens = std::any_of(layers.begin(), layers.end(), [](const Json& layer) {
    return std::isfinite(NumberOf(layer, "token_entropy_bits"));
  });
  const std::string given = tokens ? "the token id and the expert of the layer before"
                                   : "the layer's expert of the token before and the "
                                     "expert of the layer before";
  page->Section("Spread of load across layers");
  page->Charts({LineChartSvg(AcrossLayers(
                    layers, "Entropy of the experts", "bits",
                    {{"entropy_bits", "alone"},
                     {"conditional_entropy_bits", "given the layer before"},
                     {"held_out_entropy_bits",
                      tokens ? "given token and layer before, held out"
                             : "given token before and layer before, held out"}})),
                LineChartSvg(AcrossLayers(layers, "Unevenness", "deviation / mean",
                                          {{"cv", "CV"}})),
                LineChartSvg(AcrossLayers(
                    layers, "Experts that the token before used too", "share",
                    {{"previous_token_recall", "of a token's experts"}}))});
  page->Paragraph(
      "Held out: what a model of four fifths of the documents needs for the others, "
      "given " +
      given + ".");
  page->AddTable(table, "Tokens an expert gets, by MoE layer");
}

// Row: a layer; column: an earlier one. Nothing where a stack has two layers: the table
// says it.
std::string InformationMap(const std::vector<Json>& layers, const std::string& phase) {
  HeatImage map{phase + ": information shared by two layers",
                "earlier MoE layer",
                "MoE layer",
                "normalised mutual information",
                {},
                0,
                0,
                1,
                1};
  std::vector<std::vector<double>> previous;
  for (const Json& layer : layers) {
    if (TextOf(layer, "phase") != phase) continue;
    previous.push_back(NumbersOf(layer, "nmi_previous"));
    for (const double v : previous.back()) map.high = std::max(map.high, v);
  }
  if (previous.size() < 3) return "";
  map.high = std::max(0.1, std::ceil(map.high * 10) / 10);
  map.values.assign(previous.size() - 1, std::vector<double>(previous.size() - 1, NAN));
  for (size_t l = 1; l < previous.size(); ++l) {
    for (size_t back = 1; back <= previous[l].size() && back <= l; ++back) {
      map.values[l - 1][l - back] = previous[l][back - 1];
    }
  }
  return HeatImageSvg(map);
}

void AddInformation(const std::vector<Json>& layers, HtmlReport* page) {
  std::vector<std::string> charts;
  Table table(
      {"<layer", "with the token id", "1 layer back", "2 back", "3 back", "4 back"});
  BarChart token{
      "Information shared with the token id", "normalised", {}, {{"", {}, {}}}, 0};
  bool any = false, any_token = false;
  for (const Json& layer : layers) {
    const std::vector<double> previous = NumbersOf(layer, "nmi_previous");
    const double with_token = NumberOf(layer, "nmi_token");
    std::vector<std::string> cells = {LayerName(layer), Fixed(with_token, 3)};
    for (size_t b = 0; b < 4; ++b) {
      cells.push_back(b < previous.size() ? Fixed(previous[b], 3) : "-");
    }
    table.AddRow(cells);
    token.categories.push_back(LayerName(layer));
    token.series[0].values.push_back(with_token);
    any_token = any_token || std::isfinite(with_token);
    any = any || any_token || !previous.empty();
  }
  for (const char* phase : {"encoder", "decoder"}) {
    const std::string map = InformationMap(layers, phase);
    if (!map.empty()) charts.push_back(map);
  }
  if (any_token) charts.push_back(BarChartSvg(token));
  if (!any) return;
  page->Section("What layers and tokens tell about each other");
  page->Paragraph(
      "Normalised mutual information, 2 I(X; Y) / (H(X) + H(Y)): 0 where one says "
      "nothing "
      "of the other, 1 where each gives the other away. Counted from the store itself, "
      "so "
      "it reads high where pairs are few, as they are with token ids.");
  if (!charts.empty()) page->Charts(charts);
  page->AddTable(table, "Normalised mutual information of a layer's expert");
}

std::vector<TransitionMap> WithTokens(std::vector<TransitionMap> maps) {
  std::erase_if(maps, [](const TransitionMap& map) {
    return std::none_of(map.counts.begin(), map.counts.end(),
                        [](uint64_t c) { return c; });
  });
  return maps;
}

void AddTransitions(const std::vector<TransitionMap>& maps, HtmlReport* page) {
  if (maps.empty()) return;
  std::vector<std::string> charts;
  const size_t shown = std::min(kMapsShown, maps.size());
  for (size_t i = 0; i < shown; ++i) {
    const TransitionMap& t = maps[shown == 1 ? 0 : i * (maps.size() - 1) / (shown - 1)];
    const auto experts = static_cast<size_t>(std::lround(std::sqrt(t.counts.size())));
    std::vector<std::vector<double>> share(experts);
    for (size_t r = 0; r < experts; ++r) {
      const auto row = t.counts.begin() + static_cast<ptrdiff_t>(r * experts);
      const auto total = static_cast<double>(
          std::accumulate(row, row + static_cast<ptrdiff_t>(experts), uint64_t{0}));
      for (size_t c = 0; c < experts; ++c) {
        share[r].push_back(total > 0
                               ? static_cast<double>(row[static_cast<ptrdiff_t>(c)]) /
                                     total * static_cast<double>(experts)
                               : NAN);
      }
    }
    HeatImage map{t.phase + ": layer " + std::to_string(t.layer - 1) + " to " +
                      std::to_string(t.layer),
                  "expert of layer " + std::to_string(t.layer),
                  "expert of layer " + std::to_string(t.layer - 1),
                  "share of the row's tokens, 1 = even",
                  Coarsened(share, kMostCells),
                  0,
                  std::max(4.0, static_cast<double>(experts) / 8),
                  (experts + kMostCells - 1) / kMostCells};
    charts.push_back(HeatImageSvg(map));
  }
  page->Section("Transitions from layer to layer");
  std::string text =
      "Where the tokens of an expert go in the next MoE layer. A row without colour is "
      "an "
      "expert that no token chose.";
  if (shown < maps.size()) {
    text += " " + std::to_string(shown) + " of " + std::to_string(maps.size()) +
            " maps are shown, evenly chosen; transitions.csv has all.";
  }
  page->Paragraph(text);
  page->Charts(charts);
}

// The most frequent paths: a line each over the layers, experts upwards.
std::string JourneyChart(const std::string& phase, const std::vector<Json>& paths) {
  LineChart chart{phase + ": most frequent journeys",
                  "MoE layer of the stack",
                  "expert",
                  {},
                  true,
                  true};
  for (size_t i = 0; i < std::min(kDrawnPaths, paths.size()); ++i) {
    LineSeries line{
        Percent(NumberOf(paths[i], "share"), 2), {}, NumbersOf(paths[i], "experts")};
    for (size_t l = 0; l < line.y.size(); ++l) line.x.push_back(static_cast<double>(l));
    chart.series.push_back(std::move(line));
  }
  return LineChartSvg(chart);
}

void AddJourneys(const Json& stats, HtmlReport* page) {
  const Json all = stats.value("journeys", Json::object());
  std::vector<std::string> charts;
  Table table({"<stack", "<experts, first layer to last", "tokens", "share"});
  std::string summary;
  for (const char* phase : {"encoder", "decoder"}) {
    if (!all.contains(phase)) continue;
    const std::vector<Json> paths = EntriesWith(all[phase], "experts");
    if (paths.empty() || NumbersOf(paths[0], "experts").size() < 2) continue;
    charts.push_back(JourneyChart(phase, paths));
    double covered = 0;
    for (size_t i = 0; i < paths.size(); ++i) {
      covered += NumberOf(paths[i], "share");
      if (i >= kTablePaths) continue;
      table.AddRow({phase, ExpertsText(paths[i]),
                    ShortNumber(NumberOf(paths[i], "count")),
                    Percent(NumberOf(paths[i], "share"), 2)});
    }
    summary += std::string(summary.empty() ? "" : " ") + "The tokens of the " + phase +
               " took " + (NumberOf(all[phase], "uncounted") > 0 ? "more than " : "") +
               ShortNumber(NumberOf(all[phase], "distinct")) +
               " different journeys through its layers; the " +
               std::to_string(paths.size()) + " most frequent carry " + Percent(covered) +
               " of them.";
  }
  if (charts.empty()) return;
  page->Section("Journeys of tokens");
  page->Paragraph(summary);
  page->Charts(charts);
  page->AddTable(table, "Most frequent journeys");
  Table samples(
      {"<stack", "sequence", "position", "token id", "<experts, first layer to last"});
  for (const Json& p :
       EntriesWith(stats.value("sample_paths", Json::array()), "experts")) {
    samples.AddRow({TextOf(p, "phase"), Fixed(NumberOf(p, "sequence_id"), 0),
                    Fixed(NumberOf(p, "position"), 0), Fixed(NumberOf(p, "token_id"), 0),
                    ExpertsText(p)});
  }
  if (samples.num_rows() > 0) page->Details("Sampled tokens and their journeys", samples);
}

void AddPercentiles(const std::vector<Json>& layers, HtmlReport* page) {
  const std::vector<std::string> shown = {"p50", "p75", "p90", "p95"};
  std::vector<std::string> columns = {"<layer"};
  for (const char* what : {"probability", "margin"}) {
    for (const std::string& p : shown) columns.push_back(std::string(what) + " " + p);
  }
  Table table(columns);
  bool any = false;
  for (const Json& layer : layers) {
    const Json all = layer.value("percentiles", Json::object());
    std::vector<std::string> cells = {LayerName(layer)};
    for (const char* what : {"gate_probs", "margins"}) {
      const Json of = all.value(what, Json::object());
      for (const std::string& p : shown) {
        cells.push_back(Fixed(NumberOf(of, p), 3));
        any = any || std::isfinite(NumberOf(of, p));
      }
    }
    table.AddRow(cells);
  }
  if (!any) return;
  page->Section("The router's certainty");
  page->AddTable(
      table, "Probability of the chosen expert, and its lead over the second (logits)");
}

}  // namespace

std::string RoutingReportHtml(const RoutingPage& in) {
  HtmlReport page("Routing statistics", in.store);
  const std::vector<Json> all = EntriesWith(in.stats, "load"), layers = WithTokens(all);
  AddKeyFigures(in.stats, layers, all.size(), &page);
  AddAbout(in.stats, &page);
  AddWithoutTokens(all, &page);
  AddLoad(layers, &page);
  AddSpread(layers, &page);
  AddInformation(layers, &page);
  AddTransitions(WithTokens(in.transitions), &page);
  AddJourneys(in.stats, &page);
  AddPercentiles(layers, &page);
  return page.Finish();
}

}  // namespace routecast
