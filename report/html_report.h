// One self-contained page: no script, nothing from outside, light and dark, at most 1 MB.
// Thread rule: one thread at a time.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "common/files.h"
#include "report/table.h"

namespace routecast {

class HtmlReport {
 public:
  static constexpr size_t kMaxBytes = 1'000'000;

  HtmlReport(std::string title, std::string subtitle);
  // Texts are escaped; `svg` is the text of report/svg_chart.h and goes in as it is.
  void Section(const std::string& heading);
  void Paragraph(const std::string& text);
  void KeyFigures(const std::vector<std::pair<std::string, std::string>>& label_value);
  void Charts(const std::vector<std::string>& svg);  // side by side where there is room
  // The same, folded away until it is opened; nothing where there are none. What is
  // folded is left out, and said to be, where the page would be larger than kMaxBytes:
  // the largest first, of equal ones the last.
  void FoldedCharts(const std::string& summary, const std::vector<std::string>& svg);
  void AddTable(const Table& table, const std::string& caption);
  // Folded away until it is opened.
  void Details(const std::string& summary, const Table& table);

  // Throws std::length_error where what is not folded is larger than kMaxBytes.
  std::string Finish() const;
  void Write(const fs::path& path) const;  // atomic

 private:
  struct Part {
    std::string summary;  // of what is folded; empty: it stays
    std::string html;
  };
  void Add(const std::string& html);
  void AddFolded(const std::string& summary, const std::string& html);
  std::string title_, subtitle_;
  std::vector<Part> parts_;
};

}  // namespace routecast
