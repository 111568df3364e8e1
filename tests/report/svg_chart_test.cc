#include "report/svg_chart.h"

#include <gtest/gtest.h>

#include <cmath>

namespace routecast {
namespace {

size_t Count(const std::string& text, const std::string& part) {
  size_t count = 0;
  for (size_t at = text.find(part); at != std::string::npos;
       at = text.find(part, at + 1)) {
    ++count;
  }
  return count;
}

TEST(ShortNumber, KeepsFourDigitsAndUnits) {
  EXPECT_EQ(ShortNumber(0), "0");
  EXPECT_EQ(ShortNumber(0.12346), "0.1235");
  EXPECT_EQ(ShortNumber(9999), "9999");
  EXPECT_EQ(ShortNumber(9999.7), "10k");
  EXPECT_EQ(ShortNumber(9999800), "10M");
  EXPECT_EQ(ShortNumber(-25000), "-25k");
  EXPECT_EQ(ShortNumber(3.2e10), "32G");
  EXPECT_EQ(ShortNumber(NAN), "-");
}

TEST(LineChart, TitlesAndNamesAreEscaped) {
  const std::string svg =
      LineChartSvg({"<script>", "x&y", "y", {{"a<b", {0, 1}, {0, 1}}}});
  EXPECT_EQ(svg.find("<script>"), std::string::npos);
  EXPECT_NE(svg.find("&lt;script&gt;"), std::string::npos);
  EXPECT_NE(svg.find("x&amp;y"), std::string::npos);
}

// Beyond the picture's edge it would be cut off.
TEST(LineChart, LongTitlesAndNamesAreSetNarrower) {
  const std::string name(120, 'n');
  const LineChart chart{
      std::string(90, 't'), "x", "y", {{name, {1}, {2}}, {"b", {1}, {3}}}};
  EXPECT_EQ(Count(LineChartSvg(chart), " textLength=\""), 2u);
  EXPECT_EQ(Count(LineChartSvg({"t", "x", "y", {{"a", {1}, {2}}}}), "textLength"), 0u);
}

TEST(LineChart, AGapWhereAValueIsNotFinite) {
  const std::string svg =
      LineChartSvg({"t", "x", "y", {{"a", {0, 1, 2, 3}, {1, NAN, 2, 3}}}});
  EXPECT_EQ(svg.find("nan"), std::string::npos);
  EXPECT_EQ(Count(svg, "<circle"), 3u);
}

TEST(LineChart, NothingAndASinglePointAreCharts) {
  EXPECT_NE(LineChartSvg({"t", "x", "y", {}}).find("</svg>"), std::string::npos);
  const std::string one = LineChartSvg({"t", "x", "y", {{"a", {5}, {7}}}});
  EXPECT_EQ(Count(one, "<circle"), 1u);
  EXPECT_EQ(one.find("nan"), std::string::npos);
  EXPECT_EQ(one.find("inf"), std::string::npos);
}

TEST(BarChart, OneBarAValueAndThreeStrokesAnErrorBar) {
  const std::string svg = BarChartSvg(
      {"t", "y", {"c0", "c1"}, {{"a", {1, 2}, {0.5, NAN}}, {"b", {3, NAN}, {}}}, 0});
  EXPECT_EQ(Count(svg, "<rect"), 3u + 2u);  // three bars, two keys
  EXPECT_EQ(Count(svg, "class=\"err\""), 3u);
}

TEST(BoxChart, ABoxAValueWhiskersAndTheReference) {
  BoxChart chart;
  chart.title = "t";
  chart.categories = {"c0", "c1"};
  chart.series = {{"a", {{1, 2, 3, 4, 5}, {NAN, 2, 3, 4, 5}}}};
  chart.reference = 6;
  chart.reference_name = "bound";
  const std::string svg = BoxChartSvg(chart);
  EXPECT_EQ(Count(svg, "<rect"), 1u);  // the second is not finite
  EXPECT_EQ(Count(svg, "class=\"median\""), 1u);
  EXPECT_EQ(Count(svg, "class=\"err\""), 2u);
  EXPECT_EQ(Count(svg, "class=\"mark\""), 1u);
  EXPECT_NE(svg.find(">bound<"), std::string::npos);
  EXPECT_EQ(svg.find("nan"), std::string::npos);
}

TEST(BoxChart, NothingIsAChart) {
  EXPECT_NE(BoxChartSvg({}).find("</svg>"), std::string::npos);
}

TEST(HeatMap, OneCellAValueAndEndsOfTheScale) {
  const std::string svg =
      HeatMapSvg({"t", "x", "load", {"r0", "r1"}, {{0, 2}, {1, NAN}}, 0, 2});
  EXPECT_EQ(Count(svg, "fill=\"#00224e\""), 1u);  // the lowest
  EXPECT_EQ(Count(svg, "fill=\"#fee838\""), 1u);  // the highest
  EXPECT_EQ(Count(svg, "<rect"), 3u + 24u);       // cells and legend
}

// 61 layers of 256 experts are 1.4 MB cell by cell.
TEST(HeatMap, JoinsColumnsOfLargeMapsAndItsAxisCountsWhatTheyStandFor) {
  HeatMap map{"t", "expert", "load", {}, {}, 0, 2};
  for (int l = 0; l < 61; ++l) {
    map.rows.push_back(std::to_string(l));
    map.values.emplace_back(256, 1.0);
    map.values.back()[3] = NAN;
  }
  const std::string svg = HeatMapSvg(map);
  EXPECT_EQ(Count(svg, "<rect"), 61u * 64 + 24);
  EXPECT_NE(svg.find(">expert, 4 a column<"), std::string::npos);
  EXPECT_NE(svg.find(">240<"), std::string::npos);  // the last number of the axis
  EXPECT_EQ(Count(svg, ScaleColour(0.5)), 61u * 64) << "means, of what is there";
}

TEST(BarChart, LongNamesAreCutBetweenCharacters) {
  const std::string long_name = "prédicteur-entraîné-éé-longtemps";
  const std::string svg = BarChartSvg({"t", "y", {long_name}, {{"a", {1}, {}}}, 0});
  EXPECT_NE(svg.find(">prédicteur-entraî…<"), std::string::npos) << svg;
}

TEST(Thinned, KeepsEndsAndBoundsTheCount) {
  LineSeries series{"a", {}, {}};
  for (int i = 0; i < 1000; ++i) series.x.push_back(i), series.y.push_back(-i);
  const LineSeries thin = Thinned(series, 100);
  ASSERT_EQ(thin.x.size(), 100u);
  EXPECT_EQ(thin.x.front(), 0);
  EXPECT_EQ(thin.x.back(), 999);
  EXPECT_EQ(thin.y.back(), -999);
}

}  // namespace
}  // namespace routecast
