// The loss against plain loops.
#include "trainer/speculation_loss.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

namespace routecast {
namespace {

// -log softmax(scores)[id]
double CrossEntropy(const at::Tensor& scores, int64_t id) {
  double total = 0;
  for (int64_t i = 0; i < scores.size(0); ++i) {
    total += std::exp(scores[i].item<double>());
  }
  return std::log(total) - scores[id].item<double>();
}

TEST(SpeculationLoss, AddsTheNextTokensWhereTheModelGuessesThem) {
  SpeculationBatch batch;
  batch.window.token_ids_BT = at::tensor({3, 1, 4, 2, 0, 0}, at::kLong).view({2, 3});
  batch.window.valid_BT = at::tensor({1, 1, 1, 1, 1, 0}).to(at::kBool).view({2, 3});
  batch.labels_BTH = at::full({2, 3, 1}, -100, at::kLong);
  batch.labels_BTH[0][1][0] = 2;
  SpeculationOutput output;
  output.logits_BTHE = at::randn({2, 3, 1, 4});
  const double routing = SpeculationLoss(output, batch, {0, 0.5}).total.item<double>();
  EXPECT_NEAR(routing, CrossEntropy(output.logits_BTHE[0][1][0], 2), 1e-5);
  output.next_token_BTV = at::randn({2, 3, 5});
  // Of the first sequence both successors, of the second one; the padding has none.
  const double next = CrossEntropy(output.next_token_BTV[0][0], 1) +
                      CrossEntropy(output.next_token_BTV[0][1], 4) +
                      CrossEntropy(output.next_token_BTV[1][0], 0);
  const LossSums sums = SpeculationLoss(output, batch, {0, 0.5});
  EXPECT_NEAR(sums.total.item<double>(), routing + 0.5 * next, 1e-5);
  EXPECT_NEAR(sums.cross_entropy, routing, 1e-5);  // what is reported is the routing's
}

}  // namespace
}  // namespace routecast
