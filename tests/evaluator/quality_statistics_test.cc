#include "evaluator/quality_statistics.h"

#include <gtest/gtest.h>

#include <cmath>

namespace routecast {
namespace {

TEST(RouterDistributionTest, WhatTheRecordedChoicesLeaveIsSpreadEvenly) {
  RoutingSpan span;
  span.num_tokens = 2;
  span.num_layers = 1;
  std::vector<float> probs(4);
  EXPECT_FALSE(RouterDistribution(span, 0, 1, &probs));
  span.top_k = 2;
  span.topk_ids = {0, 1, 3, 0};
  span.topk_probs = {.9f, .1f, .5f, .3f};
  ASSERT_TRUE(RouterDistribution(span, 0, 1, &probs));
  EXPECT_FLOAT_EQ(probs[0], .3f);
  EXPECT_FLOAT_EQ(probs[1], .1f);
  EXPECT_FLOAT_EQ(probs[2], .1f);
  EXPECT_FLOAT_EQ(probs[3], .5f);
}

TEST(RouterAgreementTest, EqualDistributionsAgreeWholly) {
  RouterAgreement agreement;
  const std::vector<float> probs = {.5f, .3f, .1f, .1f};
  agreement.Add(probs.data(), probs, 2);
  EXPECT_NEAR(agreement.kl(), 0, 1e-9);
  EXPECT_NEAR(agreement.correlation(), 1, 1e-9);
  EXPECT_EQ(agreement.overlap(), 1);
  EXPECT_EQ(agreement.constant_rows(), 0);
}

TEST(RouterAgreementTest, IsTheMeanOfItsRows) {
  RouterAgreement agreement;
  const std::vector<float> router = {.5f, .25f, .25f, 0};
  const float reversed[] = {0, .25f, .25f, .5f}, even[] = {.25f, .25f, .25f, .25f};
  agreement.Add(reversed, router, 1);
  agreement.Add(even, router, 1);  // ties go to the lower id, which is right here
  EXPECT_EQ(agreement.rows(), 2);
  EXPECT_EQ(agreement.constant_rows(), 1);
  EXPECT_NEAR(agreement.correlation(), -1, 1e-6);
  EXPECT_NEAR(agreement.overlap(), .5, 1e-9);
  // KL of the reversed: .5 ln(.5 / 1e-8); of the even: .5 ln 2 + 2 * .25 ln 1.
  EXPECT_NEAR(agreement.kl(), (.5 * std::log(.5 / 1e-8) + .5 * std::log(2)) / 2, 1e-3);
}

TEST(RouterAgreementTest, NothingAddedIsNotANumber) {
  EXPECT_TRUE(std::isnan(RouterAgreement().kl()));
  EXPECT_TRUE(std::isnan(RouterAgreement().correlation()));
}

TEST(AdaptationTest, CountsTokensUntilAWindowIsNearTheEnd) {
  const std::vector<float> before(300, .8f);
  std::vector<float> after(150, 0.f);
  after.resize(600, 1.f);
  const auto adaptation = AdaptationOf(before, after);
  ASSERT_TRUE(adaptation.has_value());
  EXPECT_NEAR(adaptation->before, .8, 1e-6);
  EXPECT_EQ(adaptation->first, 0);
  EXPECT_EQ(adaptation->after, 1);
  EXPECT_EQ(adaptation->tokens, 240);  // 90 right ones of a hundred
}

TEST(AdaptationTest, AtOnceIsOneWindow) {
  const std::vector<float> same(200, .5f);
  EXPECT_EQ(AdaptationOf(same, same)->tokens, 100);
}

TEST(AdaptationTest, ShortSeriesClaimNothing) {
  const std::vector<float> enough(200, .5f), few(199, .5f);
  EXPECT_FALSE(AdaptationOf(enough, few).has_value());
  EXPECT_FALSE(AdaptationOf(few, enough).has_value());
}

}  // namespace
}  // namespace routecast
