#include "report/heat_image.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>

#include "report/svg_chart.h"

namespace routecast {
namespace {

constexpr uint8_t kEmpty = 255;  // palette: 0..254 the scale, 255 no value

uint32_t Crc32(const std::string& bytes) {
  uint32_t crc = 0xFFFFFFFF;
  for (const char c : bytes) {
    crc ^= static_cast<uint8_t>(c);
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0xEDB88320 : 0);
  }
  return ~crc;
}

uint32_t Adler32(const std::string& bytes) {
  uint32_t a = 1, b = 0;
  for (const char c : bytes) {
    a = (a + static_cast<uint8_t>(c)) % 65521;
    b = (b + a) % 65521;
  }
  return b << 16 | a;
}

std::string BigEndian(uint32_t value) {
  std::string bytes;
  for (int shift = 24; shift >= 0; shift -= 8)
    bytes += static_cast<char>(value >> shift & 0xFF);
  return bytes;
}

void AddPngChunk(const std::string& type, const std::string& data, std::string* png) {
  *png += BigEndian(static_cast<uint32_t>(data.size())) + type + data +
          BigEndian(Crc32(type + data));
}

// A zlib stream of stored blocks: small maps need no compressor.
std::string Stored(const std::string& raw) {
  constexpr size_t kMostStored = 65535;
  std::string out = "\x78\x01";
  for (size_t at = 0; at < raw.size() || at == 0; at += kMostStored) {
    const size_t n = std::min(kMostStored, raw.size() - at);
    out += at + n == raw.size() ? '\x01' : '\x00';
    for (const size_t word : {n, n ^ 0xFFFF}) {
      out += static_cast<char>(word & 0xFF);
      out += static_cast<char>(word >> 8 & 0xFF);
    }
    out += raw.substr(at, n);
  }
  return out + BigEndian(Adler32(raw));
}

std::string Base64(const std::string& bytes) {
  constexpr char kDigits[] =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string out;
  for (size_t i = 0; i < bytes.size(); i += 3) {
    const size_t n = std::min<size_t>(3, bytes.size() - i);
    uint32_t word = 0;
    for (size_t k = 0; k < 3; ++k) {
      word = word << 8 | (k < n ? static_cast<uint8_t>(bytes[i + k]) : 0);
    }
    for (size_t k = 0; k < 4; ++k) {
      out += k <= n ? kDigits[word >> (18 - 6 * k) & 63] : '=';
    }
  }
  return out;
}

std::string Label(double x, double y, const char* anchor, const char* css,
                  const std::string& text) {
  char place[96];
  std::snprintf(place, sizeof place, "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\" ", x,
                y, anchor);
  return std::string(place) + "class=\"" + css + "\">" + EscapeHtml(text) + "</text>";
}

// The colour scale from `x` on, with its ends and what it means.
std::string Legend(const HeatImage& image, double x, double y) {
  constexpr int kSteps = 24;
  std::string out;
  for (int i = 0; i < kSteps; ++i) {
    char box[128];
    std::snprintf(box, sizeof box,
                  "<rect x=\"%.1f\" y=\"%.1f\" width=\"5.2\" height=\"11\" fill=\"%s\"/>",
                  x + 5.0 * i, y, ScaleColour((i + 0.5) / kSteps).c_str());
    out += box;
  }
  return Label(x - 6, y + 10, "end", "t", ShortNumber(image.low)) + out +
         Label(x + 5 * kSteps + 6, y + 10, "start", "t",
               ShortNumber(image.high) + " or more") +
         Label(x - 20, y + 30, "start", "t", image.legend);
}

// Numbers along both axes: all of them, or about eight.
std::string AxisNumbers(const HeatImage& image, double left, double top, double side) {
  std::string out;
  for (const bool down : {true, false}) {
    const size_t cells = down                   ? image.values.size()
                         : image.values.empty() ? 0
                                                : image.values[0].size();
    if (cells == 0) continue;
    const size_t step = cells <= 16 ? 1 : (cells + 7) / 8;
    for (size_t i = 0; i < cells; i += step) {
      const double at =
          (static_cast<double>(i) + 0.5) / static_cast<double>(cells) * side;
      const size_t number = i * image.cell + (down ? image.first_row : 0);
      out +=
          down ? Label(left - 6, top + at + 4, "end", "t", std::to_string(number))
               : Label(left + at, top + side + 16, "middle", "t", std::to_string(number));
    }
  }
  return out;
}

}  // namespace

std::string PalettePng(const std::vector<std::vector<uint8_t>>& pixels,
                       const std::vector<std::string>& palette) {
  const size_t width = pixels.empty() ? 0 : pixels[0].size();
  std::string colours, raw;
  for (const std::string& colour : palette) {
    for (size_t c = 1; c < 7; c += 2) {
      colours += static_cast<char>(std::stoi(colour.substr(c, 2), nullptr, 16));
    }
  }
  for (const auto& row : pixels) {
    raw += '\0';  // no filter
    raw.append(row.begin(), row.end());
  }
  std::string png = "\x89PNG\r\n\x1a\n";
  AddPngChunk("IHDR",
              BigEndian(static_cast<uint32_t>(width)) +
                  BigEndian(static_cast<uint32_t>(pixels.size())) +
                  std::string("\x08\x03\x00\x00\x00", 5),
              &png);
  AddPngChunk("PLTE", colours, &png);
  // Cells without a value show the page.
  AddPngChunk("tRNS", std::string(255, '\xFF') + std::string(1, '\0'), &png);
  AddPngChunk("IDAT", Stored(raw), &png);
  AddPngChunk("IEND", "", &png);
  return png;
}

std::vector<std::vector<double>> Coarsened(const std::vector<std::vector<double>>& values,
                                           size_t most) {
  const size_t rows = values.size(), columns = values.empty() ? 0 : values[0].size();
  const size_t step = (std::max(rows, columns) + most - 1) / most;
  if (step <= 1) return values;
  std::vector<std::vector<double>> coarse((rows + step - 1) / step);
  for (size_t r = 0; r < coarse.size(); ++r) {
    for (size_t c = 0; c < columns; c += step) {
      double sum = 0, n = 0;
      for (size_t i = r * step; i < std::min(rows, (r + 1) * step); ++i) {
        for (size_t j = c; j < std::min(columns, c + step); ++j) {
          if (!std::isfinite(values[i][j])) continue;
          sum += values[i][j];
          ++n;
        }
      }
      coarse[r].push_back(n > 0 ? sum / n : NAN);
    }
  }
  return coarse;
}

std::string HeatImageSvg(const HeatImage& image) {
  constexpr double kWidth = 560, kLeft = 60, kTop = 32, kSide = 400;
  const double span = image.high > image.low ? image.high - image.low : 1;
  std::vector<std::vector<uint8_t>> pixels;
  for (const auto& row : image.values) {
    std::vector<uint8_t>& line = pixels.emplace_back();
    for (const double v : row) {
      const double unit = std::clamp((v - image.low) / span, 0.0, 1.0);
      line.push_back(std::isfinite(v) ? static_cast<uint8_t>(unit * (kEmpty - 1))
                                      : kEmpty);
    }
  }
  std::vector<std::string> palette;
  for (int i = 0; i < kEmpty; ++i) palette.push_back(ScaleColour(i / (kEmpty - 1.0)));
  palette.push_back("#000000");
  char frame[160];
  std::snprintf(frame, sizeof frame,
                "<image x=\"%.0f\" y=\"%.0f\" width=\"%.0f\" height=\"%.0f\" "
                "preserveAspectRatio=\"none\" style=\"image-rendering:pixelated\" ",
                kLeft, kTop, kSide, kSide);
  const double bottom = kTop + kSide;
  return "<svg class=\"chart\" role=\"img\" aria-label=\"" + EscapeHtml(image.title) +
         "\" viewBox=\"0 0 " + ShortNumber(kWidth) + " " + ShortNumber(bottom + 92) +
         "\">" + Label(kLeft, 18, "start", "th", image.title) + frame +
         "href=\"data:image/png;base64," + Base64(PalettePng(pixels, palette)) + "\"/>" +
         AxisNumbers(image, kLeft, kTop, kSide) +
         Label(kLeft + kSide / 2, bottom + 36, "middle", "t", image.x_label) +
         "<text transform=\"translate(18 " + ShortNumber(kTop + kSide / 2) +
         ") rotate(-90)\" text-anchor=\"middle\" class=\"t\">" +
         EscapeHtml(image.y_label) + "</text>" + Legend(image, kLeft + 20, bottom + 50) +
         "</svg>";
}

}  // namespace routecast
