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
