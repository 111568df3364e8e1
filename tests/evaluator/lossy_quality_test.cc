#include "evaluator/lossy_quality.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

namespace routecast {
namespace {

OutputLog Log(const std::vector<at::Tensor>& logits, const std::vector<at::Tensor>& ids) {
  OutputLog log(1 << 20);
  for (size_t t = 0; t < logits.size(); ++t) {
    log.Add(logits[t]);
    log.Add(ids[t]);
  }
  return log;
}

at::Tensor Ids(std::vector<int64_t> ids) { return at::tensor(ids, at::kLong); }

TEST(LossyQualityTest, EqualOutputsChangeNothing) {
  at::manual_seed(1);
  const auto a = at::randn({2, 5}), b = at::randn({2, 5});
  const OutputLog log = Log({a, b}, {a.argmax(1), b.argmax(1)});
  LossyQuality quality;
  quality.Compare(log, log);
  EXPECT_EQ(quality.sequences(), 2);
  EXPECT_EQ(quality.exact_match(), 1);
  EXPECT_NEAR(quality.logit_kl(), 0, 1e-7);
  EXPECT_NEAR(quality.perplexity_change(), 0, 1e-7);
}

// By hand: p = (0.8, 0.2), q = (0.5, 0.5), and the reference chose 0.
TEST(LossyQualityTest, KlAndPerplexityAreThoseOfTheDefinition) {
  const at::Tensor p = at::tensor({std::log(0.8), std::log(0.2)}).view({1, 2});
  const at::Tensor q = at::tensor({std::log(0.5), std::log(0.5)}).view({1, 2});
  LossyQuality quality;
  quality.Compare(Log({p}, {Ids({0})}), Log({q}, {Ids({1})}));
  EXPECT_NEAR(quality.logit_kl(), 0.8 * std::log(0.8 / 0.5) + 0.2 * std::log(0.2 / 0.5),
              1e-6);
  EXPECT_NEAR(quality.perplexity_change(), 0.8 / 0.5 - 1, 1e-6);
  EXPECT_EQ(quality.exact_match(), 0);
}

// After another choice two different texts go on: their logits say nothing.
TEST(LossyQualityTest, StepsBehindADifferenceDoNotCount) {
  at::manual_seed(2);
  const auto a = at::randn({2, 4}), b = at::randn({2, 4});
  const auto other = b + at::tensor({0.f, 0.f, 0.f, 9.f});
  LossyQuality quality;
  // Sequence 0 chose otherwise at the first step; sequence 1 at none.
  quality.Compare(Log({a, b}, {Ids({0, 1}), Ids({2, 3})}),
                  Log({a, at::cat({other.slice(0, 0, 1), b.slice(0, 1)})},
                      {Ids({1, 1}), Ids({2, 3})}));
  EXPECT_NEAR(quality.logit_kl(), 0, 1e-7);
  EXPECT_EQ(quality.exact_match(), 0.5);
}

TEST(LossyQualityTest, OnlyStepsAreKeptAndOnlyAsManyAsFit) {
  OutputLog log(100);
  log.Add(at::zeros({2, 3, 4}));  // an encoder's output
  log.Add(at::zeros({1, 8}));
  log.Add(Ids({0}));
  EXPECT_EQ(log.steps().size(), 1u);
  EXPECT_EQ(log.bytes(), 40u);
  log.Add(at::zeros({1, 64}));
  log.Add(Ids({0}));
  EXPECT_FALSE(log.whole());
  EXPECT_TRUE(log.steps().empty());
}

}  // namespace
}  // namespace routecast
