#include <algorithm>
#include <cmath>

#include "report/svg_chart.h"
#include "report/svg_parts.h"

namespace routecast {

using namespace svg;

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
