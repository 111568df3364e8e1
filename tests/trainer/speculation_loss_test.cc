// What is added to the cross-entropy of labels, each against plain loops.
#include "trainer/speculation_loss.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace routecast {
namespace {

// Against cosines one by one; negative ones are no harm.
TEST(ContrastiveLoss, IsInfoNceOverCosines) {
  at::manual_seed(4);
  const auto h = at::randn({3, 5}), keys = at::randn({4, 5});
  const auto truth = at::tensor({0, 1, 3, 2, 2, 0}, at::kLong).view({3, 2});
  const auto loss = ContrastiveLoss(h, keys, truth);
  for (int n = 0; n < 3; ++n) {
    double all = 0, expected = 0;
    std::vector<double> cosine;
    for (int e = 0; e < 4; ++e) {
      const double norms = h[n].norm().item<double>() * keys[e].norm().item<double>();
      cosine.push_back(h[n].dot(keys[e]).item<double>() / norms);
      all += std::exp(cosine.back() / 0.1);
    }
    for (int k = 0; k < 2; ++k) {
      expected += (std::log(all) - cosine[size_t(truth[n][k].item<int64_t>())] / 0.1) / 2;
    }
    EXPECT_NEAR(loss[n].item<double>(), expected, 1e-4);
  }
}

TEST(ConsistencyLoss, ComparesNeighboursThatBothCount) {
  const auto logits =
      at::tensor({1.f, 0.f, 0.f, 2.f, 3.f, 0.f, 1.f, 1.f}).view({1, 4, 1, 2});
  const auto labels = at::tensor({0, 0, 1, -100}, at::kLong).view({1, 4, 1});
  // Cosines 0 of the same expert, 0 of another; the last one has no label.
  EXPECT_NEAR(ConsistencyLoss(logits, labels).item<double>(), 1, 1e-5);
}

TEST(DiversityLoss, IsTheDivergenceOfTheMeanFromUniform) {
  const auto logits = at::tensor({0.75f, 0.25f, 0.75f, 0.25f}).view({2, 2}).log();
  const double expected = 2 * (std::log(0.5 / 0.75) + std::log(0.5 / 0.25)) / 2;
  EXPECT_NEAR(DiversityLoss(logits).item<double>(), expected, 1e-5);
  EXPECT_NEAR(DiversityLoss(at::zeros({3, 4})).item<double>(), 0, 1e-5);
}

// Two tokens with a label each, of three experts; the first is right.
struct SmallBatch {
  SmallBatch() {
    batch.window.token_ids_BT = at::zeros({1, 3}, at::kLong);
    batch.window.valid_BT = at::tensor({1, 1, 0}).to(at::kBool).view({1, 3});
    batch.labels_BTH = at::tensor({2, 0, -100}, at::kLong).view({1, 3, 1});
    output.logits_BTHE =
        at::tensor({0.f, 1.f, 2.f, -1.f, .5f, 0.f, 9.f, 9.f, 9.f}).view({1, 3, 1, 3});
    output.confidence_BTH = at::tensor({.7f, .4f, .1f}).view({1, 3, 1});
    output.confidence_BTH.requires_grad_(true);
    output.pattern_entropy_BT = at::tensor({3.f, 2.f, 9.f}).view({1, 3});
  }
  double Total(const LossWeights& weights) const {
    return SpeculationLoss(output, batch, weights).total.item<double>();
  }
  SpeculationBatch batch;
  SpeculationOutput output;
  // Of the true experts.
  const double first = std::exp(2.) / (1 + std::exp(1.) + std::exp(2.));
  const double second = std::exp(-1.) / (std::exp(-1.) + std::exp(.5) + 1);
};

// mean(.25 (1 - p)^2 CE) + .1 mean((c - right)^2) - .01 mean(entropy), here as sums.
TEST(PublishedLosses, TheBaselinesIsFocal) {
  const SmallBatch b;
  LossWeights weights;
  weights.focal = true;
  const double focal = .25 * (1 - b.first) * (1 - b.first) * -std::log(b.first) +
                       .25 * (1 - b.second) * (1 - b.second) * -std::log(b.second);
  EXPECT_NEAR(b.Total(weights), focal, 1e-6);
  weights.confidence = .1;
  weights.confidence_form = ConfidenceFormOf("squared");
  EXPECT_NEAR(b.Total(weights), focal + .1 * (.3 * .3 + .4 * .4), 1e-6);
  weights.pattern_entropy = .01;
  EXPECT_NEAR(b.Total(weights), focal + .1 * (.3 * .3 + .4 * .4) - .01 * (3 + 2), 1e-6);
}

TEST(PublishedLosses, ConfidenceIsDrawnToOneHalf) {
  const SmallBatch b;
  LossWeights weights;
  const double routing = -std::log(b.first) - std::log(b.second);
  EXPECT_NEAR(b.Total(weights), routing, 1e-6);
  weights.confidence_form = ConfidenceFormOf("half");
  for (const double weight : {.1, .05}) {
    weights.confidence = weight;
    EXPECT_NEAR(b.Total(weights), routing + weight * (.2 * .2 + .1 * .1), 1e-6);
  }
  weights.confidence_form = ConfidenceFormOf("cross_entropy");
  weights.confidence = .1;
  EXPECT_NEAR(b.Total(weights), routing - .1 * (std::log(.7) + std::log(.6)), 1e-6);
}

TEST(FocalCrossEntropy, IsTheMeanOverAllThatATokenChose) {
  const auto logits = at::tensor({0.f, 1.f, 2.f}).view({1, 3});
  const auto truth = at::tensor({2, 0}, at::kLong).view({1, 2});
  const double all = 1 + std::exp(1.) + std::exp(2.), p2 = std::exp(2.) / all,
               p0 = 1 / all;
  const auto part = [](double p, double cost) { return .25 * (1 - p) * (1 - p) * cost; };
  EXPECT_NEAR(FocalCrossEntropy(logits, truth).item<double>(),
              (part(p2, -std::log(p2)) + part(p0, -std::log(p0))) / 2, 1e-6);
  // Smoothing is of the cost alone.
  const double even = -(std::log(p2) + std::log(p0) + std::log(std::exp(1.) / all)) / 3;
  EXPECT_NEAR(FocalCrossEntropy(logits, truth.narrow(1, 0, 1), .3).item<double>(),
              part(p2, -.7 * std::log(p2) + .3 * even), 1e-6);
}

// lambda CE(A) + (1 - lambda) CE(B), where A has a token.
TEST(MixupLoss, LabelsCountByTheirShares) {
  at::manual_seed(6);
  SpeculationBatch batch;
  batch.window.token_ids_BT = at::zeros({2, 2}, at::kLong);
  batch.window.valid_BT = at::tensor({1, 1, 1, 0}).to(at::kBool).view({2, 2});
  batch.labels_BTH = at::tensor({1, 2, 0, -100}, at::kLong).view({2, 2, 1});
  batch.window.training.order_B = at::tensor({1, 0}, at::kLong);
  batch.window.training.share_B = at::tensor({.75, .5}).to(at::kFloat);
  const SpeculationOutput output{at::randn({2, 2, 1, 3}), at::ones({2, 2, 1})};
  const auto log_probs = at::log_softmax(output.logits_BTHE, 3);
  const auto cost = [&](int b, int t, int label) {
    return -log_probs[b][t][0][label].item<double>();
  };
  const double expected = .75 * cost(0, 0, 1) + .25 * cost(0, 0, 0) +  // B: 0
                          .75 * cost(0, 1, 2) +                        // B has none there
                          .5 * cost(1, 0, 0) + .5 * cost(1, 0, 1);
  const LossSum sum = SpeculationLoss(output, batch, {});
  EXPECT_NEAR(sum.total.item<double>(), expected, 1e-5);
  EXPECT_EQ(sum.labels, 3);
}

}  // namespace
}  // namespace routecast
