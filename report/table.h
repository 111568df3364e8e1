// One table, three forms: text for the console, HTML for a report, CSV for a file.
// Thread rule: one thread at a time.
#pragma once

#include <string>
#include <vector>

namespace routecast {

class Table {
 public:
  // A column whose name starts with '<' is aligned to the left (the mark is not shown);
  // others to the right, as numbers are.
  explicit Table(std::vector<std::string> columns);
  void AddRow(
      std::vector<std::string> cells);  // REQUIRES one cell a column (defect otherwise)
  size_t num_rows() const { return rows_.size(); }

  std::string ToText() const;  // columns two spaces apart, a rule under the head
  std::string ToHtml() const;
  std::string ToCsv() const;  // RFC 4180

 private:
  std::vector<std::string> columns_;
  std::vector<bool> left_;
  std::vector<std::vector<std::string>> rows_;
};

// Cells: "-" where the value is not finite.
std::string Fixed(double value, int decimals);
std::string Percent(double share, int decimals = 1);  // 0.25 -> "25.0 %"

}  // namespace routecast
