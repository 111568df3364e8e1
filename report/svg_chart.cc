#include "report/svg_chart.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>

#include "report/svg_parts.h"

namespace routecast {

using namespace svg;

namespace {

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
      keys +=
          Key(x, y, i) + FittedText(x + 22, y, kWidth - kRight - x - 22, "t", legend[i]);
      x += width;
    }
    top_ = legend.size() > 1 ? y + 14 : kTitle + 8;
    height_ = kHeight + (top_ - kTitle - 8);
    body_ = FittedText(kLeft, 16, kWidth - kRight - kLeft, "th", title, kBoldCharacter) +
            keys;
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

bool Continues(char c) { return (c & '\xc0') == '\x80'; }  // a character of UTF-8

// At most kLongestLabel characters.
std::string Shortened(const std::string& name) {
  size_t characters = 0, kept = 0;  // kept: bytes of all but the last
  for (size_t i = 0; i < name.size(); ++i) {
    if (Continues(name[i])) continue;
    if (++characters == kLongestLabel) kept = i;
  }
  return characters > kLongestLabel ? name.substr(0, kept) + "…" : name;
}

// Equal places below a plot, their names slanted where they are too long.
class CategoryAxis {
 public:
  explicit CategoryAxis(const std::vector<std::string>& names)
      : names_(names),
        width_((kWidth - kLeft - kRight) /
               static_cast<double>(std::max<size_t>(1, names.size()))) {
    size_t longest = 0;
    for (const std::string& name : names) longest = std::max(longest, name.size());
    slanted_ = kCharacter * static_cast<double>(longest) > width_;
  }
  double width() const { return width_; }
  double below() const { return slanted_ ? 78 : 26; }
  double Left(const Plot& plot, size_t i) const {
    return plot.left() + width_ * static_cast<double>(i);
  }
  void Label(size_t i, Plot* plot) const {
    const std::string name = Shortened(names_[i]);
    const double middle = Left(*plot, i) + width_ / 2;
    if (!slanted_)
      return plot->Add(Text(middle, plot->bottom() + 17, "middle", "t", name));
    plot->Add("<text transform=\"translate(" + Number(middle) + " " +
              Number(plot->bottom() + 12) +
              ") rotate(-35)\" text-anchor=\"end\" class=\"t\">" + EscapeHtml(name) +
              "</text>");
  }

 private:
  const std::vector<std::string>& names_;
  double width_;
  bool slanted_ = false;
};

// Box of the quartiles, line at the median, whiskers to the ends; around `middle`.
std::string Box(const FiveValues& five, double middle, double width, size_t series,
                const Plot& plot) {
  for (double value : five) {
    if (!std::isfinite(value)) return "";
  }
  const double half = width / 2, y1 = plot.Y(five[1]), y3 = plot.Y(five[3]);
  return Line(middle, plot.Y(five[4]), middle, y3, "err") +
         Line(middle, y1, middle, plot.Y(five[0]), "err") +
         Rect(middle - half, y3, width, std::max(y1 - y3, 3.0),
              "class=\"f " + Colour(series) + "\"") +
         Line(middle - half, plot.Y(five[2]), middle + half, plot.Y(five[2]), "median");
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
    if (std::abs(value) < 9999.5) break;  // else %.4g has an exponent
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
  const CategoryAxis axis(chart.categories);
  Plot plot(chart.title, names, false, axis.below());
  plot.YAxis(chart.y_label, y);
  for (size_t c = 0; c < chart.categories.size(); ++c) {
    plot.Add(Group(chart, c, axis.Left(plot, c) + axis.width() * 0.1, axis.width() * 0.8,
                   plot));
    axis.Label(c, &plot);
  }
  return plot.Finish(chart.title);
}

std::string BoxChartSvg(const BoxChart& chart) {
  std::vector<std::string> names;
  Range y;
  for (const BoxSeries& s : chart.series) {
    names.push_back(s.name);
    for (const FiveValues& five : s.boxes) {
      for (double value : five) y.Add(value);
    }
  }
  if (std::isfinite(chart.reference)) y.Add(chart.reference);
  if (chart.y_from_zero) y.Add(0);
  y.MakeUsable();
  const CategoryAxis axis(chart.categories);
  Plot plot(chart.title, names, false, axis.below());
  plot.YAxis(chart.y_label, y);
  if (std::isfinite(chart.reference)) {
    const double at = plot.Y(chart.reference);
    plot.Add(Line(plot.left(), at, plot.right(), at, "mark"));
    plot.Add(Text(plot.left() + 4, at - 5, "start", "t", chart.reference_name));
  }
  const double place =
      axis.width() * 0.8 / static_cast<double>(std::max<size_t>(1, chart.series.size()));
  for (size_t c = 0; c < chart.categories.size(); ++c) {
    for (size_t s = 0; s < chart.series.size(); ++s) {
      if (c >= chart.series[s].boxes.size()) continue;
      const double middle = axis.Left(plot, c) + axis.width() * 0.1 +
                            place * (static_cast<double>(s) + 0.5);
      plot.Add(
          Box(chart.series[s].boxes[c], middle, std::min(place * 0.7, 40.0), s, plot));
    }
    axis.Label(c, &plot);
  }
  return plot.Finish(chart.title);
}

}  // namespace routecast
