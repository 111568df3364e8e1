// The loss against plain loops.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "trainer/speculation_loss.h"

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
  const LossSum sum = SpeculationLoss(output, batch, {0, 0.5});
  EXPECT_NEAR(sum.total.item<double>(), routing + 0.5 * next, 1e-5);
  // What is reported is the routing's.
  EXPECT_NEAR(ScoresOf(output, batch).cross_entropy, routing, 1e-5);
}

// All sequences once, as many together as their memory allows.
TEST(EvaluationBatches, LongSequencesComeInFewer) {
  std::vector<RoutingTrace> traces(60);
  for (size_t i = 0; i < traces.size(); ++i) {
    traces[i].sequence_id = traces[i].group_id = i;
    traces[i].decoder.num_tokens = i % 2 == 0 ? 100 : 256;
    traces[i].decoder.num_layers = 1;
  }
  TraceDataset dataset(traces, {0, 1, 4, 1, 0});
  const auto groups = GroupsOf(dataset, SplitPart::kTrain, WithHidden::kNo);
  ASSERT_EQ(groups.size(), 2u);  // sources -1 and 0
  size_t seen = 0, largest = 0, of_long = 0;
  for (const MicroBatch& batch : EvaluationBatches(dataset, groups, 8, 0, 1)) {
    bool any_long = false;
    for (const uint32_t s : batch.sequences) any_long = any_long || s % 2 == 1;
    auto& most = any_long ? of_long : largest;
    most = std::max(most, batch.sequences.size());
    seen += batch.sequences.size();
  }
  EXPECT_EQ(seen, 2 * groups[0].pool->sequences.size());
  EXPECT_EQ(largest, 8u);
  EXPECT_EQ(of_long, 2u);
}

}  // namespace
}  // namespace routecast
