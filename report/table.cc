#include "report/table.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <stdexcept>

#include "report/svg_chart.h"

namespace routecast {
namespace {

// Characters shown, not bytes: continuation bytes of UTF-8 take no room.
size_t Width(const std::string& text) {
  return static_cast<size_t>(std::count_if(
      text.begin(), text.end(), [](char c) { return (c & '\xc0') != '\x80'; }));
}

std::string Padded(const std::string& text, size_t width, bool left) {
  const std::string space(width - std::min(width, Width(text)), ' ');
  return left ? text + space : space + text;
}

std::string CsvCell(const std::string& text) {
  if (text.find_first_of(",\"\r\n") == std::string::npos) return text;
  std::string out = "\"";
  for (char c : text) out += c == '"' ? std::string("\"\"") : std::string(1, c);
  return out + "\"";
}

}  // namespace

Table::Table(std::vector<std::string> columns) : columns_(std::move(columns)) {
  for (std::string& name : columns_) {
    left_.push_back(!name.empty() && name[0] == '<');
    if (left_.back()) name.erase(0, 1);
  }
}

void Table::AddRow(std::vector<std::string> cells) {
  if (cells.size() != columns_.size()) {
    throw std::logic_error("a table of " + std::to_string(columns_.size()) +
                           " columns was given " + std::to_string(cells.size()) +
                           " cells");
  }
  rows_.push_back(std::move(cells));
}

std::string Table::ToText() const {
  std::vector<size_t> widths;
  for (size_t c = 0; c < columns_.size(); ++c) {
    size_t width = Width(columns_[c]);
    for (const auto& row : rows_) width = std::max(width, Width(row[c]));
    widths.push_back(width);
  }
  const auto line = [&](const std::vector<std::string>& cells) {
    std::string text;
    for (size_t c = 0; c < cells.size(); ++c) {
      text += (c > 0 ? "  " : "") + Padded(cells[c], widths[c], left_[c]);
    }
    return text.substr(0, text.find_last_not_of(' ') + 1) + "\n";
  };
  std::vector<std::string> rule;
  for (size_t width : widths) rule.emplace_back(width, '-');
  std::string text = line(columns_) + line(rule);
  for (const auto& row : rows_) text += line(row);
  return text;
}

std::string Table::ToHtml() const {
  const auto cells = [&](const std::vector<std::string>& row, const std::string& tag) {
    std::string html = "<tr>";
    for (size_t c = 0; c < row.size(); ++c) {
      html += "<" + tag + (left_[c] ? " class=\"left\">" : ">") + EscapeHtml(row[c]) +
              "</" + tag + ">";
    }
    return html + "</tr>\n";
  };
  std::string html = "<div class=\"scroll\"><table><thead>" + cells(columns_, "th") +
                     "</thead><tbody>\n";
  for (const auto& row : rows_) html += cells(row, "td");
  return html + "</tbody></table></div>\n";
}

std::string Table::ToCsv() const {
  const auto line = [](const std::vector<std::string>& cells) {
    std::string text;
    for (size_t c = 0; c < cells.size(); ++c)
      text += (c > 0 ? "," : "") + CsvCell(cells[c]);
    return text + "\r\n";
  };
  std::string text = line(columns_);
  for (const auto& row : rows_) text += line(row);
  return text;
}

std::string Fixed(double value, int decimals) {
  if (!std::isfinite(value)) return "-";
  char text[64];
  std::snprintf(text, sizeof text, "%.*f", decimals, value);
  return text;
}

std::string Percent(double share, int decimals) {
  return std::isfinite(share) ? Fixed(share * 100, decimals) + " %" : "-";
}

}  // namespace routecast
