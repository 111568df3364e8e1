#include <algorithm>
#include <cmath>
#include <utility>

#include "report/svg_chart.h"
#include "report/svg_parts.h"

namespace routecast {

using namespace svg;

namespace {

constexpr size_t kMostCells = 4500;  // of a map, 90 bytes each

// Means over `each` neighbouring columns.
std::vector<double> Joined(const std::vector<double>& row, size_t each) {
  std::vector<double> joined;
  for (size_t c = 0; c < row.size(); c += each) {
    double sum = 0, n = 0;
    for (size_t i = c; i < std::min(row.size(), c + each); ++i) {
      if (std::isfinite(row[i])) sum += row[i], ++n;
    }
    joined.push_back(n > 0 ? sum / n : NAN);
  }
  return joined;
}

// A map of at most kMostCells (of more rows one column each); how many columns are one.
std::pair<HeatMap, size_t> Bounded(HeatMap map) {
  size_t cells = 0;
  for (const auto& row : map.values) cells += row.size();
  const size_t each = std::max<size_t>(1, (cells + kMostCells - 1) / kMostCells);
  if (each == 1) return {std::move(map), each};
  for (auto& row : map.values) row = Joined(row, each);
  map.x_label += ", " + std::to_string(each) + " a column";
  return {std::move(map), each};
}

}  // namespace

std::string HeatMapSvg(const HeatMap& whole) {
  const auto [map, each] = Bounded(whole);
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
                 std::to_string(c * each));
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
