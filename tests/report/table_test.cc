#include "report/table.h"

#include <gtest/gtest.h>

#include <cmath>
#include <stdexcept>

namespace routecast {
namespace {

Table Sample() {
  Table table({"<name", "value"});
  table.AddRow({"a<b", "1"});
  table.AddRow({"é, \"q\"", "22"});
  return table;
}

TEST(Table, TextAlignsByCharactersNotBytes) {
  EXPECT_EQ(Sample().ToText(),
            "name    value\n"
            "------  -----\n"
            "a<b         1\n"
            "é, \"q\"     22\n");
}

TEST(Table, HtmlEscapes) {
  const std::string html = Sample().ToHtml();
  EXPECT_NE(html.find("a&lt;b"), std::string::npos);
  EXPECT_EQ(html.find("a<b"), std::string::npos);
  EXPECT_NE(html.find("<td class=\"left\">a"), std::string::npos);
}

TEST(Table, CsvQuotes) {
  EXPECT_EQ(Sample().ToCsv(), "name,value\r\na<b,1\r\n\"é, \"\"q\"\"\",22\r\n");
}

TEST(Table, RefusesARowOfAnotherWidth) {
  EXPECT_THROW(Sample().AddRow({"one"}), std::logic_error);
}

TEST(Cells, ValuesThatAreNotFiniteAreDashes) {
  EXPECT_EQ(Fixed(NAN, 1), "-");
  EXPECT_EQ(Fixed(2.25, 1), "2.2");
  EXPECT_EQ(Percent(INFINITY), "-");
  EXPECT_EQ(Percent(0.254), "25.4 %");
}

}  // namespace
}  // namespace routecast
