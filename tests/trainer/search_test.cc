// What a search draws, how long its rungs are, and what its file may hold.
#include "trainer/search.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/errors.h"

namespace routecast {
namespace {

Json Space() {
  return Json::parse(R"({"trials": 9, "factor": 3, "rungs": 3, "space": {
      "learning_rate": {"log": [1e-4, 1e-2]}, "layers": {"int": [1, 3]},
      "dropout": {"uniform": [0, 0.3]}, "width": [64, 128]}})");
}

TEST(SearchTest, DrawsAreAFunctionOfSeedAndTrial) {
  const SearchSpace space = SearchSpace::FromJson(Space(), "test");
  EXPECT_EQ(space.Draw(1, 3), space.Draw(1, 3));
  EXPECT_NE(space.Draw(1, 3), space.Draw(1, 4));
  EXPECT_NE(space.Draw(1, 3), space.Draw(2, 3));
  int below = 0;
  std::vector<int> layers(4);
  for (int t = 0; t < 300; ++t) {
    const auto values = space.Draw(1, t);
    EXPECT_TRUE(values.at("width") == 64 || values.at("width") == 128);
    EXPECT_GE(values.at("learning_rate"), 1e-4);
    EXPECT_LE(values.at("learning_rate"), 1e-2);
    below += values.at("learning_rate") < 1e-3;
    ++layers.at(static_cast<size_t>(values.at("layers")));
  }
  EXPECT_NEAR(below, 150, 40);  // even in the logarithm
  for (int n = 1; n <= 3; ++n) EXPECT_NEAR(layers[size_t(n)], 100, 35);
}

TEST(SearchTest, EachRungHasAFactorMoreSteps) {
  EXPECT_EQ(RungSteps(900, 0, 3, 3), 100);
  EXPECT_EQ(RungSteps(900, 1, 3, 3), 300);
  EXPECT_EQ(RungSteps(900, 2, 3, 3), 900);
  EXPECT_EQ(RungSteps(2, 0, 3, 3), 1);
}

TEST(SearchTest, EverySearchableNameSetsSomething) {
  for (const std::string& name : SearchableNames()) {
    SpeculationOptions options;
    SetOption(name, 0.0625 * 1024, &options);
    EXPECT_NE(options.ToJson(), SpeculationOptions().ToJson()) << name;
  }
}

TEST(SearchTest, MistakesInTheSpaceAreNamed) {
  const std::pair<const char*, const char*> cases[] = {
      {R"({})", "space"},
      {R"({"space": {}})", "space"},
      {R"({"space": {"learning_rat": [1]}})", "learning_rate"},
      {R"({"space": {"width": []}})", "list of numbers"},
      {R"({"space": {"width": ["x"]}})", "holds"},
      {R"({"space": {"width": {"log": [0, 1]}}})", "above 0"},
      {R"({"space": {"width": {"log": [2, 1]}}})", "lower first"},
      {R"({"space": {"width": {"lag": [1, 2]}}})", "log"},
      {R"({"trials": 0, "space": {"width": [1]}})", "trials"},
      {R"({"rungs": 99, "space": {"width": [1]}})", "rungs"}};
  for (const auto& [text, expected] : cases) {
    try {
      SearchSpace::FromJson(Json::parse(text), "space.json");
      ADD_FAILURE() << text;
    } catch (const UsageError& e) {
      EXPECT_THAT(e.what(), testing::HasSubstr(expected)) << text;
    }
  }
}

}  // namespace
}  // namespace routecast
