// What charts are made of. Sizes are of the picture's own units. Only the room's charts
// include it.
#pragma once

#include <array>
#include <cstdio>
#include <string>

#include "report/svg_chart.h"

namespace routecast::svg {

constexpr double kWidth = 560, kHeight = 300;
constexpr double kLeft = 60, kRight = 14, kTitle = 24, kLegendRow = 18, kBottom = 48;
constexpr size_t kLongestLabel = 18;
constexpr double kCharacter = 6.4;      // mean width of a 12 px character
constexpr double kBoldCharacter = 7.8;  // of a title's, 13.5 px and bold

inline std::string Number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f", value);
  return text;
}

inline std::string Text(double x, double y, const std::string& anchor,
                        const std::string& css, const std::string& text) {
  return "<text x=\"" + Number(x) + "\" y=\"" + Number(y) + "\" text-anchor=\"" + anchor +
         "\" class=\"" + css + "\">" + EscapeHtml(text) + "</text>";
}

// Begins at x and takes at most `width`: what is longer is set narrower, not cut off.
// A `character` is about so wide.
inline std::string FittedText(double x, double y, double width, const std::string& css,
                              const std::string& text, double character = kCharacter) {
  const double own = character * static_cast<double>(text.size());
  const std::string narrow = own <= width ? ""
                                          : " textLength=\"" + Number(width) +
                                                "\" lengthAdjust=\"spacingAndGlyphs\"";
  return "<text x=\"" + Number(x) + "\" y=\"" + Number(y) +
         "\" text-anchor=\"start\" class=\"" + css + "\"" + narrow + ">" +
         EscapeHtml(text) + "</text>";
}

inline std::string Line(double x1, double y1, double x2, double y2,
                        const std::string& css) {
  return "<line x1=\"" + Number(x1) + "\" y1=\"" + Number(y1) + "\" x2=\"" + Number(x2) +
         "\" y2=\"" + Number(y2) + "\" class=\"" + css + "\"/>";
}

inline std::string Rect(double x, double y, double w, double h,
                        const std::string& attributes) {
  return "<rect x=\"" + Number(x) + "\" y=\"" + Number(y) + "\" width=\"" + Number(w) +
         "\" height=\"" + Number(h) + "\" " + attributes + "/>";
}

inline std::string Colour(size_t series) {
  return "s" + std::to_string(series % kSeriesColours);
}
inline std::string Dash(size_t series) {
  constexpr std::array<const char*, 4> kDashes = {"", "6 3", "2 3", "8 3 2 3"};
  const std::string dash = kDashes[(series + series / kSeriesColours) % kDashes.size()];
  return dash.empty() ? "" : " stroke-dasharray=\"" + dash + "\"";
}

}  // namespace routecast::svg
