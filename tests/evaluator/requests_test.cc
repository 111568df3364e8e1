// Which requests run together, and where they come from.
#include "evaluator/requests.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>

#include "common/errors.h"
#include "common/random.h"
#include "evaluator/route_schedule.h"
#include "tests/support/reference.h"

namespace routecast {
namespace {

using testing::ElementsAre;

TEST(RouteScheduleTest, RequestsOfOneTopicShareABatch) {
  const std::vector<float> a = {0.9f, 0.9f, 0, 0}, b = {0, 0, 0.9f, 0.9f};
  const auto order = ScheduleByRoute({a, b, a, b, b, a}, 3);
  EXPECT_THAT(order, ElementsAre(0, 2, 5, 1, 3, 4));
}

TEST(RouteScheduleTest, TheOldestRequestStartsEachBatch) {
  std::vector<std::vector<float>> routes;
  for (uint64_t r = 0; r < 24; ++r) {
    routes.emplace_back();
    for (uint64_t e = 0; e < 16; ++e)
      routes.back().push_back(static_cast<float>(ToUnit(Mix(5, r, e))));
  }
  const auto order = ScheduleByRoute(routes, 4);
  std::vector<bool> seen(24, false);
  for (size_t i = 0; i < order.size(); ++i) {
    if (i % 4 == 0) {
      const auto oldest = std::find(seen.begin(), seen.end(), false) - seen.begin();
      EXPECT_EQ(order[i], static_cast<size_t>(oldest));
    }
    EXPECT_FALSE(seen[order[i]]);
    seen[order[i]] = true;
  }
  EXPECT_EQ(order.size(), 24u);
}

// Each choice against the slow definition: the smallest expected union.
TEST(RouteScheduleTest, EveryMemberAddsTheFewestExperts) {
  std::vector<std::vector<float>> routes;
  for (uint64_t r = 0; r < 12; ++r) {
    routes.emplace_back();
    for (uint64_t e = 0; e < 8; ++e)
      routes.back().push_back(static_cast<float>(ToUnit(Mix(9, r, e))));
  }
  const auto order = ScheduleByRoute(routes, 4);
  for (size_t i = 0; i < order.size(); ++i) {
    if (i % 4 == 0) continue;
    std::vector<size_t> members(order.begin() + static_cast<std::ptrdiff_t>(i / 4 * 4),
                                order.begin() + static_cast<std::ptrdiff_t>(i));
    members.push_back(order[i]);
    const double chosen = ExpectedUnion(routes, members);
    for (size_t other = i + 1; other < order.size(); ++other) {
      members.back() = order[other];
      EXPECT_LE(chosen, ExpectedUnion(routes, members) + 1e-6) << i << " " << other;
    }
  }
}

// Says that token k needs expert k % E, at every lead.
class TokenIsExpert : public ExpertPredictor {
 public:
  std::string name() const override { return "token"; }
  bool needs_hidden() const override { return false; }
  int history_tokens() const override { return 1; }
  std::optional<at::Tensor> Predict(const RoutingWindow& window, int lead) override {
    if (lead > 1) return std::nullopt;
    return at::one_hot(window.token_ids_BT.remainder(window.num_experts),
                       window.num_experts)
        .to(at::kFloat);
  }
};

TEST(RequestsTest, ARouteHoldsWhatAnyTokenNeeds) {
  RequestSet set{"test", {{1, 2}, {3, 3}}, {}};
  TokenIsExpert predictor;
  const auto routes = PredictedRoutes(set, {2, 1, 4, 1, 8}, &predictor);
  ASSERT_EQ(routes.size(), 2u);
  EXPECT_THAT(routes[0], ElementsAre(0, 1, 1, 0, 0, 0, 0, 0));
  EXPECT_THAT(routes[1], ElementsAre(0, 0, 0, 1, 0, 0, 0, 0));
}

TEST(RequestsTest, WarmUpRequestsStayInOrder) {
  RequestSet set{"test", {{1}, {2}, {1}, {2}, {1}, {2}, {9}}, {}};
  TokenIsExpert predictor;
  EXPECT_THAT(OrderByRoute(set, 6, 2, 2, {1, 1, 4, 1, 8}, &predictor),
              ElementsAre(0, 1, 2, 4, 3, 5));
}

class PromptSourcesTest : public testing::Test {
 protected:
  static fs::path Data() {
    return fs::path(EnvOr("ROUTECAST_SOURCE_DIR", ".")) / "../shared/data";
  }
  static Tokenizer ShippedTokenizer() {
    return Tokenizer::Load(fs::path(EnvOr("ROUTECAST_SOURCE_DIR", ".")) /
                           "configs/checkpoints/small-16");
  }
  // At most 128 tokens each, ended, and as many as were wanted.
  static void ExpectPrompts(const std::string& kind, const std::string& file) {
    if (!fs::exists(Data() / file)) GTEST_SKIP() << "no " << file << " on this machine";
    const RequestSet set =
        ReadPrompts(kind + ":" + (Data() / file).string(), ShippedTokenizer(), 40, true);
    EXPECT_EQ(set.name, kind + ":" + fs::path(file).filename().string());
    EXPECT_EQ(set.size(), 40u);
    for (const auto& prompt : set.prompts) {
      EXPECT_LE(prompt.size(), 128u);
      EXPECT_GE(prompt.size(), 2u);
      EXPECT_EQ(prompt.back(), Tokenizer::kEos);
    }
  }
};

TEST_F(PromptSourcesTest, Wikitext) { ExpectPrompts("wikitext", "wikitext2/test.txt"); }
TEST_F(PromptSourcesTest, Squad) { ExpectPrompts("squad", "squad/xquad.en.json"); }
TEST_F(PromptSourcesTest, Glue) { ExpectPrompts("glue", "glue/QNLI_dev.tsv"); }

TEST_F(PromptSourcesTest, AFileGivesAPromptALine) {
  const fs::path file = TestFolder("requests_test") / "lines.txt";
  WriteFileAtomic(file, "one prompt\n\nanother one\n");
  const RequestSet set = ReadPrompts(file.string(), ShippedTokenizer(), 10, true);
  EXPECT_EQ(set.name, "lines.txt");
  EXPECT_EQ(set.size(), 2u);
}

TEST_F(PromptSourcesTest, ALineThatIsTooLongIsNamed) {
  const fs::path file = TestFolder("requests_test") / "long.txt";
  std::string line;
  for (int i = 0; i < 5000; ++i) line += "word ";
  WriteFileAtomic(file, "one prompt\n\n" + line + "\n");
  EXPECT_EQ(ReadPrompts(file.string(), ShippedTokenizer(), 1, true).size(), 1u)
      << "what is not asked for is not read";
  try {
    ReadPrompts(file.string(), ShippedTokenizer(), 2, true);
    FAIL() << "was taken";
  } catch (const UsageError& e) {
    EXPECT_THAT(e.what(), testing::HasSubstr("line 3"));
    EXPECT_THAT(e.what(), testing::HasSubstr("at most 2047"));
  }
}

TEST_F(PromptSourcesTest, WhatIsNotThereIsUsage) {
  EXPECT_THROW(ReadPrompts("/nowhere.txt", ShippedTokenizer(), 1, true), UsageError);
  EXPECT_THROW(ReadPrompts("wikitext:/nowhere", ShippedTokenizer(), 1, true), UsageError);
  EXPECT_THROW(ReadPrompts("novel:/nowhere", ShippedTokenizer(), 1, true), UsageError);
}

}  // namespace
}  // namespace routecast
