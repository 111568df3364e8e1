// Charts as SVG text for a page of report/html_report.h: colours are that page's CSS
// variables (light and dark), every series also differs by dash or position, axes are
// labelled. Thread rule: pure functions, any thread. Texts are escaped here; values that
// are not finite are left out.
#pragma once

#include <array>
#include <limits>
#include <string>
#include <vector>

namespace routecast {

constexpr int kSeriesColours = 8;  // further series repeat colours with another dash

struct LineSeries {
  std::string name;
  std::vector<double> x, y;  // same length
};
struct LineChart {
  std::string title, x_label, y_label;
  std::vector<LineSeries> series;
  bool y_from_zero = false;  // else the axis fits the values
  bool whole_x = false;      // ticks at whole numbers only
};

struct BarSeries {
  std::string name;
  std::vector<double> values;      // one a category; NaN = no bar
  std::vector<double> half_width;  // of the error bar; empty or one a category
};
struct BarChart {
  std::string title, y_label;
  std::vector<std::string> categories;
  std::vector<BarSeries> series;
  double y_max = 0;  // 0 = fits the values
};

using FiveValues = std::array<double, 5>;  // least, quartiles, most
struct BoxSeries {
  std::string name;
  std::vector<FiveValues> boxes;  // one a category; not finite = no box
};
struct BoxChart {
  std::string title, y_label;
  std::vector<std::string> categories;
  std::vector<BoxSeries> series;
  // A line across at a value that boxes are held against; not finite = none.
  double reference = std::numeric_limits<double>::quiet_NaN();
  std::string reference_name;
  bool y_from_zero = false;
};

struct HeatMap {
  std::string title, x_label, legend;  // legend says what the colour means, with unit
  std::vector<std::string> rows;
  std::vector<std::vector<double>> values;  // [row][column]
  double low = 0, high = 1;                 // values of the two ends of the colour scale
};

std::string LineChartSvg(const LineChart& chart);
std::string BarChartSvg(const BarChart& chart);
std::string BoxChartSvg(const BoxChart& chart);
// Of more than 4,500 cells neighbouring columns are joined (their mean), so that pages
// stay small; the axis counts what they stand for, and its label says it.
std::string HeatMapSvg(const HeatMap& whole);

// "#rrggbb" of a colour scale from 0 to 1 that also reads without colour vision.
std::string ScaleColour(double unit);
// For numbers in axes and tables: 4 significant digits, k/M/G from 10,000 on.
std::string ShortNumber(double value);
// Text for HTML and SVG: & < > " ' become entities.
std::string EscapeHtml(const std::string& text);
// At most `points` of a long series, evenly spaced, first and last kept: bounds the
// page's size.
LineSeries Thinned(const LineSeries& series, size_t points);

}  // namespace routecast
