#include "report/svg_chart.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>

namespace routecast {
namespace {

constexpr double kWidth = 560, kHeight = 300;
constexpr double kLeft = 60, kRight = 14, kTitle = 24, kLegendRow = 18, kBottom = 48;
constexpr size_t kLongestLabel = 18;
constexpr double kCharacter = 6.4;  // mean width of a 12 px character

std::string Number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f", value);
  return text;
}

std::string Text(double x, double y, const std::string& anchor, const std::string& css,
                 const std::string& text) {
  return "<text x=\"" + Number(x) + "\" y=\"" + Number(y) + "\" text-anchor=\"" + anchor +
         "\" class=\"" + css + "\">" + EscapeHtml(text) + "</text>";
}

std::string Line(double x1, double y1, double x2, double y2, const std::string& css) {
  return "<line x1=\"" + Number(x1) + "\" y1=\"" + Number(y1) + "\" x2=\"" + Number(x2) +
         "\" y2=\"" + Number(y2) + "\" class=\"" + css + "\"/>";
}

std::string Rect(double x, double y, double w, double h, const std::string& attributes) {
  return "<rect x=\"" + Number(x) + "\" y=\"" + Number(y) + "\" width=\"" + Number(w) +
         "\" height=\"" + Number(h) + "\" " + attributes + "/>";
}

std::string Colour(size_t series) {
  return "s" + std::to_string(series % kSeriesColours);
}
std::string Dash(size_t series) {
  constexpr std::array<const char*, 4> kDashes = {"", "6 3", "2 3", "8 3 2 3"};
  const std::string dash = kDashes[(series + series / kSeriesColours) % kDashes.size()];
  return dash.empty() ? "" : " stroke-dasharray=\"" + dash + "\"";
}

// Round steps of 1, 2 or 5 times a power of ten that cover [low, high].
std::vector<double> Ticks(double low, double high, int wanted) {
  const double raw = (high - low) / wanted;
  const double power = std::pow(10, std::floor(std::log10(raw)));
  const double ratio = raw / power;
  const double step = power * (ratio <= 1.001   ? 1
                               : ratio <= 2.001 ? 2
                               : ratio <= 5.001 ? 5
                                                : 10);
  std::vector<double> ticks;
  for (double k = std::floor(low / step + 1e-9); k * step < high + step * 0.999; ++k) {
    ticks.push_back(k * step);
  }
  return ticks;
}

struct Range {
  double low = INFINITY, high = -INFINITY;
  void Add(double value) {
    if (!std::isfinite(value)) return;
    low = std::min(low, value);
    high = std::max(high, value);
  }
  void MakeUsable() {
    if (low > high) low = 0, high = 1;
    if (high - low < 1e-12 * std::max(1.0, std::abs(high))) {
      const double pad = std::max(std::abs(high) * 0.1, 0.5);
      low -= low >= 0 && low < pad ? low : pad;
      high += pad;
    }
  }
};

// The frame of a chart with two axes: title, legend, y grid and ticks.
class Plot {
 public:
  Plot(const std::string& title, const std::vector<std::string>& legend, bool lines,
       double below)
      : lines_(lines), below_(below) {
    double x = kLeft, y = kTitle + 12;
    std::string keys;
    for (size_t i = 0; i < legend.size() && legend.size() > 1; ++i) {
      const double width = 42 + kCharacter * static_cast<double>(legend[i].size());
      if (x + width > kWidth - kRight && x > kLeft) x = kLeft, y += kLegendRow;
      keys += Key(x, y, i) + Text(x + 22, y, "start", "t", legend[i]);
      x += width;
    }
    top_ = legend.size() > 1 ? y + 14 : kTitle + 8;
    height_ = kHeight + (top_ - kTitle - 8);
    body_ = Text(kLeft, 16, "start", "th", title) + keys;
  }
  double left() const { return kLeft; }
  double right() const { return kWidth - kRight; }
  double top() const { return top_; }
  double bottom() const { return height_ - below_; }

  void YAxis(const std::string& label, const Range& range) {
    const std::vector<double> ticks = Ticks(range.low, range.high, 5);
    low_ = ticks.front();
    high_ = ticks.back();
    for (double tick : ticks) {
      Add(Line(left(), Y(tick), right(), Y(tick), "grid"));
      Add(Text(left() - 6, Y(tick) + 4, "end", "t", ShortNumber(tick)));
    }
    const std::string middle = Number((top() + bottom()) / 2);
    Add("<text transform=\"translate(14 " + middle +
        ") rotate(-90)\" text-anchor=\"middle\" class=\"t\">" + EscapeHtml(label) +
        "</text>");
    Add(Line(left(), bottom(), right(), bottom(), "axis"));
  }
  void XLabel(const std::string& label) {
    Add(Text((left() + right()) / 2, height_ - 8, "middle", "t", label));
  }
  double Y(double value) const {
    return bottom() - (value - low_) / (high_ - low_) * (bottom() - top());
  }
  void Add(const std::string& element) { body_ += element; }
  std::string Finish(const std::string& title) const {
    return "<svg class=\"chart\" role=\"img\" aria-label=\"" + EscapeHtml(title) +
           "\" viewBox=\"0 0 " + Number(kWidth) + " " + Number(height_) + "\">" + body_ +
           "</svg>";
  }

 private:
  std::string Key(double x, double y, size_t series) const {
    if (!lines_) return Rect(x, y - 10, 14, 11, "class=\"f " + Colour(series) + "\"");
    return "<path d=\"M" + Number(x) + " " + Number(y - 4) + "h18\" class=\"l " +
           Colour(series) + "\"" + Dash(series) + "/>";
  }
  bool lines_;
  double below_, top_ = 0, height_ = 0, low_ = 0, high_ = 1;
  std::string body_;
};

std::string Polyline(const LineSeries& s, size_t index, const Plot& plot,
                     const Range& x) {
  std::string path, points;
  size_t count = 0;
  bool pen_down = false;
  for (size_t i = 0; i < std::min(s.x.size(), s.y.size()); ++i) {
    if (!std::isfinite(s.x[i]) || !std::isfinite(s.y[i])) {
      pen_down = false;
      continue;
    }
    const double px =
        plot.left() + (s.x[i] - x.low) / (x.high - x.low) * (plot.right() - plot.left());
    path += (pen_down ? "L" : "M") + Number(px) + " " + Number(plot.Y(s.y[i]));
    points += "<circle cx=\"" + Number(px) + "\" cy=\"" + Number(plot.Y(s.y[i])) +
              "\" r=\"2.6\" class=\"f " + Colour(index) + "\"/>";
    pen_down = true;
    ++count;
  }
  if (path.empty()) return "";
  constexpr size_t kMarkedPoints = 16;  // more would hide the line
  return "<path d=\"" + path + "\" class=\"l " + Colour(index) + "\"" + Dash(index) +
         "/>" + (count <= kMarkedPoints ? points : "");
}

// One group of bars in [x, x + width].
std::string Group(const BarChart& chart, size_t category, double x, double width,
                  const Plot& plot) {
  std::string out;
  const double bar = width / static_cast<double>(chart.series.size());
  for (size_t s = 0; s < chart.series.size(); ++s) {
    const BarSeries& series = chart.series[s];
    if (category >= series.values.size() || !std::isfinite(series.values[category]))
      continue;
    const double value = series.values[category];
    const double left = x + bar * static_cast<double>(s);
    const double top = plot.Y(std::max(value, 0.0));
    out += Rect(left, top, std::max(bar - 1, 0.8), plot.bottom() - top,
                "class=\"f " + Colour(s) + "\"");
    if (category >= series.half_width.size()) continue;
    const double half = series.half_width[category];
    if (!std::isfinite(half) || half <= 0) continue;
    const double middle = left + (bar - 1) / 2, cap = std::min(3.0, bar / 3);
    const double high = plot.Y(value + half), low = plot.Y(std::max(value - half, 0.0));
    out += Line(middle, high, middle, low, "err") +
           Line(middle - cap, high, middle + cap, high, "err") +
           Line(middle - cap, low, middle + cap, low, "err");
  }
  return out;
}

}  // namespace

// Cividis (Nunez, Anderton, Renslow 2018), five stops: readable without colour vision.
std::string ScaleColour(double unit) {
  constexpr double kStops[5][3] = {
      {0, 34, 78}, {65, 77, 107}, {124, 123, 120}, {188, 174, 108}, {254, 232, 56}};
  const double position = std::clamp(unit, 0.0, 1.0) * 4;
  const int stop = std::min(3, static_cast<int>(position));
  const double part = position - stop;
  int rgb[3];
  for (int c = 0; c < 3; ++c) {
    rgb[c] = static_cast<int>(
        std::lround(kStops[stop][c] + part * (kStops[stop + 1][c] - kStops[stop][c])));
  }
  char text[8];
  std::snprintf(text, sizeof text, "#%02x%02x%02x", rgb[0], rgb[1], rgb[2]);
  return text;
}

std::string EscapeHtml(const std::string& text) {
  std::string out;
  out.reserve(text.size());
  for (char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      case '\'':
        out += "&#39;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

std::string ShortNumber(double value) {
  if (!std::isfinite(value)) return "-";
  const char* unit = "";
  for (const char* next : {"k", "M", "G", "T"}) {
    if (std::abs(value) < 10000) break;
    value /= 1000;
    unit = next;
  }
  char text[48];
  std::snprintf(text, sizeof text, "%.4g%s", std::abs(value) < 1e-12 ? 0.0 : value, unit);
  return text;
}

LineSeries Thinned(const LineSeries& series, size_t points) {
  const size_t count = std::min(series.x.size(), series.y.size());
  if (count <= points || points < 2) return series;
  LineSeries out{series.name, {}, {}};
  for (size_t i = 0; i < points; ++i) {
    const size_t from = i * (count - 1) / (points - 1);
    out.x.push_back(series.x[from]);
    out.y.push_back(series.y[from]);
  }
  return out;
}

std::string LineChartSvg(const LineChart& chart) {
  std::vector<std::string> names;
  Range x, y;
  for (const LineSeries& s : chart.series) {
    names.push_back(s.name);
    for (double value : s.x) x.Add(value);
    for (double value : s.y) y.Add(value);
  }
  if (chart.y_from_zero) y.Add(0);
  x.MakeUsable();
  y.MakeUsable();
  Plot plot(chart.title, names, true, kBottom);
  plot.YAxis(chart.y_label, y);
  plot.XLabel(chart.x_label);
  for (double tick : Ticks(x.low, x.high, 6)) {
    if (chart.whole_x && tick != std::floor(tick)) continue;
    if (tick < x.low - 1e-9 || tick > x.high * (1 + 1e-9) + 1e-9) continue;
    const double px =
        plot.left() + (tick - x.low) / (x.high - x.low) * (plot.right() - plot.left());
    plot.Add(Line(px, plot.bottom(), px, plot.bottom() + 4, "axis"));
    plot.Add(Text(px, plot.bottom() + 17, "middle", "t", ShortNumber(tick)));
  }
  for (size_t i = 0; i < chart.series.size(); ++i) {
    plot.Add(Polyline(chart.series[i], i, plot, x));
  }
  return plot.Finish(chart.title);
}

std::string BarChartSvg(const BarChart& chart) {
  std::vector<std::string> names;
  Range y;
  y.Add(0);
  y.Add(chart.y_max > 0 ? chart.y_max : 0);
  for (const BarSeries& s : chart.series) {
    names.push_back(s.name);
    for (size_t i = 0; i < s.values.size(); ++i) {
      const bool bar = i < s.half_width.size() && std::isfinite(s.half_width[i]);
      y.Add(s.values[i] + (bar ? s.half_width[i] : 0));
    }
  }
  if (chart.y_max > 0) y.high = chart.y_max;
  y.MakeUsable();
  const double slot_width =
      (kWidth - kLeft - kRight) /
      static_cast<double>(std::max<size_t>(1, chart.categories.size()));
  size_t longest = 0;
  for (const std::string& c : chart.categories) longest = std::max(longest, c.size());
  const bool slanted = kCharacter * static_cast<double>(longest) > slot_width;
  Plot plot(chart.title, names, false, slanted ? 78 : 26);
  plot.YAxis(chart.y_label, y);
  for (size_t c = 0; c < chart.categories.size(); ++c) {
    const double x = plot.left() + slot_width * static_cast<double>(c);
    plot.Add(Group(chart, c, x + slot_width * 0.1, slot_width * 0.8, plot));
    std::string label = chart.categories[c];
    if (label.size() > kLongestLabel) label = label.substr(0, kLongestLabel - 1) + "…";
    if (slanted) {
      plot.Add("<text transform=\"translate(" + Number(x + slot_width / 2) + " " +
               Number(plot.bottom() + 12) +
               ") rotate(-35)\" text-anchor=\"end\" class=\"t\">" + EscapeHtml(label) +
               "</text>");
    } else {
      plot.Add(Text(x + slot_width / 2, plot.bottom() + 17, "middle", "t", label));
    }
  }
  return plot.Finish(chart.title);
}

std::string HeatMapSvg(const HeatMap& map) {
  size_t columns = 0, longest = 0;
  for (const auto& row : map.values) columns = std::max(columns, row.size());
  for (const std::string& name : map.rows) longest = std::max(longest, name.size());
  const double left = 14 + kCharacter * static_cast<double>(longest);
  const double width = 2 * kWidth, right = width - kRight, top = kTitle + 8;
  const double row_height = 24;
  const double cell = (right - left) / static_cast<double>(std::max<size_t>(1, columns));
  const double bottom = top + row_height * static_cast<double>(map.values.size());
  const double span = map.high > map.low ? map.high - map.low : 1;
  std::string body = Text(left, 16, "start", "th", map.title);
  for (size_t r = 0; r < map.values.size(); ++r) {
    const double y = top + row_height * static_cast<double>(r);
    if (r < map.rows.size()) body += Text(left - 6, y + 16, "end", "t", map.rows[r]);
    for (size_t c = 0; c < map.values[r].size(); ++c) {
      const double value = map.values[r][c];
      if (!std::isfinite(value)) continue;
      body += Rect(left + cell * static_cast<double>(c), y, cell + 0.2, row_height - 1,
                   "fill=\"" + ScaleColour((value - map.low) / span) + "\"");
    }
  }
  const size_t step = std::max<size_t>(1, (columns + 15) / 16);
  for (size_t c = 0; c < columns; c += step) {
    body += Text(left + cell * (static_cast<double>(c) + 0.5), bottom + 15, "middle", "t",
                 std::to_string(c));
  }
  body += Text(left, bottom + 38, "start", "t", map.x_label);
  constexpr int kLegendSteps = 24;
  const double legend = right - 300, legend_y = bottom + 28;
  for (int i = 0; i < kLegendSteps; ++i) {
    body += Rect(legend + i * 6.0, legend_y, 6.2, 12,
                 "fill=\"" + ScaleColour((i + 0.5) / kLegendSteps) + "\"");
  }
  body += Text(legend - 6, legend_y + 10, "end", "t",
               map.legend + ":  " + ShortNumber(map.low)) +
          Text(legend + kLegendSteps * 6 + 6, legend_y + 10, "start", "t",
               ShortNumber(map.high) + " or more");
  return "<svg class=\"chart wide\" role=\"img\" aria-label=\"" + EscapeHtml(map.title) +
         "\" viewBox=\"0 0 " + Number(width) + " " + Number(bottom + 48) + "\">" + body +
         "</svg>";
}

}  // namespace routecast
