// What a comparison says of its rows: the table, and what rows.csv leaves to
// results.json.
#include "evaluator/comparison_result.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace routecast {
namespace {

using testing::HasSubstr;
using testing::Not;

RowResult Row(const std::string& policy, const std::string& predictor, double speed_up) {
  RowResult row;
  row.policy = policy;
  row.predictor = predictor;
  row.eviction = "lru";
  row.lossless = true;
  row.speed_up = speed_up;
  row.tokens_per_second = 100 * speed_up;
  row.speed_up_spread.fill(speed_up);
  row.round_rates = {90 * speed_up, 100 * speed_up, 110 * speed_up};
  row.round_speed_ups = {speed_up, speed_up, speed_up};
  return row;
}

// It is on-demand LRU under another name: what it is ahead by is noise.
TEST(ComparisonResultTest, ARowThatIsOffIsMarkedAndNeverTheFastest) {
  ComparisonResult result;
  result.rows = {Row("on_demand", "none", 1), Row("auto", "hidden", 1.4),
                 Row("auto", "token_table", 1.9)};
  EXPECT_THAT(ComparisonTable(result), HasSubstr("(decoder): auto with token_table"));
  EXPECT_THAT(ComparisonTable(result), Not(HasSubstr("  off\n")));
  result.rows.back().switched_off = true;
  EXPECT_THAT(ComparisonTable(result), HasSubstr("(decoder): auto with hidden"));
  EXPECT_THAT(ComparisonTable(result), HasSubstr("  off\n"));
  EXPECT_EQ(result.ToJson()["rows"][2]["switched_off"], true);
}

TEST(ComparisonResultTest, EveryRoundIsInTheResultsAndNotInTheCsv) {
  ComparisonResult result;
  result.rows = {Row("auto", "hidden", 1.5)};
  const Json json = result.ToJson();
  EXPECT_EQ(json["rows"][0]["rounds"]["tokens_per_second"],
            (std::vector<double>{135, 150, 165}));
  EXPECT_EQ(json["rows"][0]["rounds"]["speed_up"], (std::vector<double>{1.5, 1.5, 1.5}));
  EXPECT_THAT(result.ToCsv(), Not(HasSubstr("rounds")));
}

}  // namespace
}  // namespace routecast
