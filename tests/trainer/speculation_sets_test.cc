// Which experts a sequence needs: scores of such sets, and the loss that asks for them.
#include "trainer/speculation_sets.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

namespace routecast {
namespace {

// Against counting by hand.
TEST(SpeculationSetsTest, AreScoredLikeSets) {
  at::manual_seed(4);
  const auto probs = at::softmax(3 * at::randn({3, 7, 2, 6}), -1);
  auto labels = at::randint(0, 6, {3, 7, 2}, at::kLong);
  labels[2].narrow(0, 4, 3).fill_(-100);
  const auto frequency = at::softmax(at::randn({2, 6}), -1);
  SetAccumulator accumulator;
  accumulator.Add(-1, probs, labels.unsqueeze(3), frequency);
  const auto scores = SetAccumulator::Scores(accumulator.Sums(2), 2);
  ASSERT_EQ(scores.size(), 2u);
  for (int lead = 1; lead <= 2; ++lead) {
    double recall = 0, precision = 0, size = 0, frequent = 0, wide = 0, frequent_wide = 0;
    for (int b = 0; b < 3; ++b) {
      std::vector<std::pair<double, int>> likely, common;
      double expected = 0;
      std::vector<bool> needed(6);
      for (int e = 0; e < 6; ++e) {
        double none = 1;
        for (int t = 0; t < 7; ++t) {
          if (labels[b][t][lead - 1].item<int>() < 0) continue;
          none *= 1 - probs[b][t][lead - 1][e].item<double>();
          needed[size_t(e)] =
              needed[size_t(e)] || labels[b][t][lead - 1].item<int>() == e;
        }
        likely.emplace_back(-(1 - none), e);
        common.emplace_back(-frequency[lead - 1][e].item<double>(), e);
        expected += 1 - none;
      }
      std::sort(likely.begin(), likely.end());
      std::sort(common.begin(), common.end());
      const int held = static_cast<int>(std::ceil(expected - 1e-6));
      int hits = 0, common_hits = 0, total = 0;
      for (int i = 0; i < held; ++i) {
        hits += needed[size_t(likely[size_t(i)].second)];
        common_hits += needed[size_t(common[size_t(i)].second)];
      }
      for (const bool n : needed) total += n;
      for (int i = 0; i < std::min(6, total * 13 / 10); ++i) {
        wide += double(needed[size_t(likely[size_t(i)].second)]) / total / 3;
        frequent_wide += double(needed[size_t(common[size_t(i)].second)]) / total / 3;
      }
      recall += double(hits) / total / 3;
      precision += double(hits) / held / 3;
      size += held / 3.0;
      frequent += double(common_hits) / total / 3;
    }
    const SetScores& s = scores[size_t(lead - 1)];
    EXPECT_NEAR(s.recall, recall, 1e-6);
    EXPECT_NEAR(s.precision, precision, 1e-6);
    EXPECT_NEAR(s.size, size, 1e-6);
    EXPECT_NEAR(s.frequency_recall, frequent, 1e-6);
    EXPECT_NEAR(s.wider_recall, wide, 1e-6);
    EXPECT_NEAR(s.wider_frequency_recall, frequent_wide, 1e-6);
    EXPECT_EQ(s.sequences, 3);
    ASSERT_EQ(s.by_tokens.size(), 1u);  // all are short
    EXPECT_EQ(s.by_tokens[0].recall, s.recall);
  }
}

TEST(SpeculationSetsTest, AreScoredByLengthAsWell) {
  auto labels = at::zeros({3, 70, 1}, at::kLong);
  labels[0].narrow(0, 16, 54).fill_(-100);  // 16 tokens, 17, 70
  labels[1].narrow(0, 17, 53).fill_(-100);
  labels[1][3][0] = 1;
  const auto probs = at::one_hot(at::zeros({3, 70, 1}, at::kLong), 6).to(at::kFloat);
  SetAccumulator accumulator;
  accumulator.Add(0, probs, labels.unsqueeze(3), at::ones({1, 6}));
  const SetScores all = SetAccumulator::Scores(accumulator.Sums(2), 2).at(0);
  EXPECT_DOUBLE_EQ(all.recall, (1 + .5 + 1) / 3);
  ASSERT_EQ(all.by_tokens.size(), 3u);
  const int most[] = {16, 64, 128};
  const double recall[] = {1, .5, 1};
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(all.by_tokens[i].sequences, 1);
    EXPECT_EQ(all.by_tokens[i].most_tokens, most[i]);
    EXPECT_DOUBLE_EQ(all.by_tokens[i].recall, recall[i]);
  }
  EXPECT_EQ(all.ToJson()["by_tokens"][1]["most_tokens"], 64);
  EXPECT_FALSE(all.ToJson().contains("most_tokens"));
}

TEST(SpeculationSetsTest, TheLossIsFiniteAndPrefersTheTrueSet) {
  auto labels = at::zeros({1, 3, 1}, at::kLong);
  labels[0][1][0] = 2;
  labels[0][2][0] = -100;
  const auto right = at::one_hot(labels.clamp_min(0), 4).to(at::kFloat) * 30;
  const auto wrong = at::one_hot(labels.clamp_min(0) + 1, 4).to(at::kFloat) * 30;
  auto logits = right.clone().requires_grad_();
  const auto loss = SetLoss(logits, labels.unsqueeze(3));
  loss.backward();
  EXPECT_TRUE(at::isfinite(logits.grad()).all().item<bool>());
  EXPECT_LT(loss.item<double>(), 0.1);
  EXPECT_GT(SetLoss(wrong, labels.unsqueeze(3)).item<double>(), 5);
}

}  // namespace
}  // namespace routecast
