// Heat maps of many cells, as an image inside SVG: a byte a cell, where rectangles would
// take a hundred. Thread rule: pure functions, any thread.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace routecast {

struct HeatImage {
  std::string title, x_label, y_label, legend;  // legend says what the colour means
  std::vector<std::vector<double>> values;      // [row][column], rows alike; NaN = empty
  double low = 0, high = 1;                     // values of the two ends of the scale
  size_t cell = 1;                              // rows and columns that a cell stands for
  size_t first_row = 0;                         // its number
};

// A square of half a page's width, rows from above.
std::string HeatImageSvg(const HeatImage& image);
// Means over neighbouring rows and columns, so that neither is more than `most`.
std::vector<std::vector<double>> Coarsened(const std::vector<std::vector<double>>& values,
                                           size_t most);
// An 8-bit palette PNG; palette entry i is "#rrggbb" number i.
std::string PalettePng(const std::vector<std::vector<uint8_t>>& pixels,
                       const std::vector<std::string>& palette);

}  // namespace routecast
