// Scores and windows against slow references.
#include "models/speculation_metrics.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "common/errors.h"
#include "speculation_test_support.h"

namespace routecast {
namespace {

struct Sample {
  at::Tensor probs, labels, documents;
};

// Probabilities on a coarse grid, so that ties happen.
Sample RandomSample(int rows, int experts, uint64_t seed) {
  Sample s{at::empty({rows, experts}), at::empty({rows}, at::kLong),
           at::empty({rows}, at::kLong)};
  for (int n = 0; n < rows; ++n) {
    for (int e = 0; e < experts; ++e) {
      s.probs.data_ptr<float>()[n * experts + e] =
          1.f + static_cast<float>(ToRange(Mix(seed, n, e), 4));
    }
    const uint64_t label = ToRange(Mix(seed, 1000, n), experts + 1);
    s.labels.data_ptr<int64_t>()[n] = label == 0 ? -100 : static_cast<int64_t>(label) - 1;
    s.documents.data_ptr<int64_t>()[n] =
        static_cast<int64_t>(ToRange(Mix(seed, 2, n), 9));
  }
  s.probs /= s.probs.sum(1, true);
  return s;
}

TEST(LeadScoresTest, EqualASlowReference) {
  const int rows = 400, experts = 13;
  const Sample s = RandomSample(rows, experts, 4);
  LeadAccumulator accumulator(Stack::kDecoder, 1, 2, 0);
  accumulator.Add(s.probs, s.labels, s.documents);
  const LeadScores scores = accumulator.Scores();
  double n = 0, loss = 0;
  std::array<double, 6> top{};
  std::array<double, 10> accuracy{}, confidence{};
  for (int i = 0; i < rows; ++i) {
    const int64_t y = s.labels[i].item<int64_t>();
    if (y < 0) continue;
    std::vector<float> p(s.probs.data_ptr<float>() + i * experts,
                         s.probs.data_ptr<float>() + (i + 1) * experts);
    std::vector<int> order(experts);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return p[a] > p[b]; });
    for (int k = 0; k < 6; ++k) {
      const auto end = order.begin() + kScoredTopK[k];
      top[k] += std::find(order.begin(), end, y) != end;
    }
    ++n;
    loss -= std::log(p[y]);
    const int bin = std::min(9, static_cast<int>(double{p[order[0]]} * 10));
    accuracy[bin] += order[0] == y;
    confidence[bin] += p[order[0]];
  }
  double ece = 0;
  for (int b = 0; b < 10; ++b) ece += std::abs(accuracy[b] - confidence[b]) / n;
  EXPECT_EQ(scores.samples, n);
  EXPECT_EQ(scores.documents, 9);
  for (int k = 0; k < 6; ++k) EXPECT_NEAR(scores.top[k], top[k] / n, 1e-12);
  EXPECT_NEAR(scores.cross_entropy, loss / n, 1e-6);
  EXPECT_NEAR(scores.ece, ece, 1e-9);
  EXPECT_LT(scores.ci95_low, scores.top1());
  EXPECT_GT(scores.ci95_high, scores.top1());
}

TEST(LeadScoresTest, RanksMergeToOne) {
  const Sample s = RandomSample(200, 7, 5);
  LeadAccumulator whole(Stack::kEncoder, 0, 1, 1), a(Stack::kEncoder, 0, 1, 1), b = a;
  whole.Add(s.probs, s.labels, s.documents);
  a.Add(s.probs.narrow(0, 0, 90), s.labels.narrow(0, 0, 90),
        s.documents.narrow(0, 0, 90));
  b.Add(s.probs.narrow(0, 90, 110), s.labels.narrow(0, 90, 110),
        s.documents.narrow(0, 90, 110));
  a.Merge(b.Bytes());
  EXPECT_EQ(a.Scores().ci95_low, whole.Scores().ci95_low);
  EXPECT_EQ(a.Scores().top, whole.Scores().top);
  EXPECT_NEAR(a.Scores().ece, whole.Scores().ece, 1e-9);
  EXPECT_THROW(a.Merge("damaged"), DataError);
}

TEST(EqualMassCalibrationTest, BinsHoldAsManyAnswersEach) {
  EXPECT_TRUE(std::isnan(EqualMassCalibration().Value()));
  EqualMassCalibration one;
  one.Add(0.75, true);
  EXPECT_DOUBLE_EQ(one.Value(), 0.25);
  // 30 answers, two a bin, of neighbouring confidence: one right, one wrong in each.
  EqualMassCalibration calibration;
  double expected = 0;
  for (int i = 29; i >= 0; --i) calibration.Add(i / 30., i % 2 == 0);
  for (int b = 0; b < 15; ++b) expected += std::abs(0.5 - (4 * b + 1) / 60.) * 2 / 30;
  EXPECT_NEAR(calibration.Value(), expected, 1e-12);
}

TEST(EqualMassCalibrationTest, AnswersOfOneConfidenceHaveNoOrder) {
  EqualMassCalibration calibration, other;
  for (int i = 0; i < 60; ++i) calibration.Add(0.5, i < 30);
  EXPECT_NEAR(calibration.Value(), 0, 1e-12);
  for (int i = 0; i < 60; ++i) other.Add(0.5, i % 2 == 0);
  EXPECT_EQ(other.Value(), calibration.Value());
  calibration.Add(0, false);  // a wrong answer without any confidence is right about it
  EXPECT_NEAR(calibration.Value(), 0, 1e-12);
}

TEST(LeadScoresTest, EqualMassErrorIsOfAllRanksAnswers) {
  const Sample s = RandomSample(300, 7, 6);
  LeadAccumulator a(Stack::kEncoder, 0, 1, 1, /*equal_mass=*/true), b = a, sum;
  a.Add(s.probs.narrow(0, 0, 120), s.labels.narrow(0, 0, 120),
        s.documents.narrow(0, 0, 120));
  b.Add(s.probs.narrow(0, 120, 180), s.labels.narrow(0, 120, 180),
        s.documents.narrow(0, 120, 180));
  EqualMassCalibration all;
  for (int n = 0; n < 300; ++n) {
    const int64_t label = s.labels[n].item<int64_t>();
    const auto [confidence, first] = s.probs[n].max(0);
    if (label >= 0) all.Add(confidence.item<float>(), first.item<int64_t>() == label);
  }
  sum.Merge(b.Bytes());
  sum.Merge(a.Bytes());
  ASSERT_TRUE(sum.Scores().ece_equal_mass);
  EXPECT_NEAR(*sum.Scores().ece_equal_mass, all.Value(), 1e-12);
  EXPECT_GT(all.Value(), 0.01);
  EXPECT_EQ(sum.Scores().ToJson()["ece_equal_mass"], *sum.Scores().ece_equal_mass);
  EXPECT_EQ(sum.Scores().samples, a.samples() + b.samples());
  LeadAccumulator without(Stack::kEncoder, 0, 1, 1);
  without.Add(s.probs, s.labels, s.documents);
  EXPECT_FALSE(without.Scores().ToJson().contains("ece_equal_mass"));
  std::string cut = a.Bytes();
  cut.resize(40);
  EXPECT_THROW(sum.Merge(cut), DataError);
}

TEST(LeadScoresTest, CertainPredictionsFallIntoTheLastBin) {
  LeadAccumulator accumulator(Stack::kEncoder, 0, 1, 1);
  accumulator.Add(at::eye(3), at::arange(3), at::zeros({3}, at::kLong));
  EXPECT_EQ(accumulator.Scores().ece, 0);
  EXPECT_EQ(accumulator.Scores().top1(), 1);
}

TEST(WindowLabelsTest, EqualTheTraceAtEveryLead) {
  const MoeGeometry g = SmallGeometry();
  const auto trace = RandomTrace(g, 6, 5, 2);
  for (Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
    const RoutingSpan& span = stack == Stack::kEncoder ? trace.encoder : trace.decoder;
    const int L = span.num_layers, T = span.num_tokens;
    for (int s = -1; s < L; ++s) {
      for (int lead = 1; lead <= L; ++lead) {
        const auto labels = WindowLabels(trace, stack, s, lead);
        for (int t = 0; t < T; ++t) {
          int layer = s + lead, token = t;
          if (stack == Stack::kDecoder && layer >= L) layer -= L, ++token;
          const bool there = layer < L && token < T && !span.dropped[layer * T + token];
          EXPECT_EQ(labels[t].item<int64_t>(),
                    there ? span.expert_ids[layer * T + token] : -100);
        }
      }
    }
  }
}

TEST(WindowTest, EncoderHidesLayersPastTheSource) {
  const auto trace = RandomTrace(SmallGeometry(), 6, 5, 2);
  const auto window = WindowOf(trace, Stack::kEncoder, 1, 5);
  EXPECT_TRUE(window.experts_BTL.narrow(2, 2, 2).eq(5).all().item<bool>());
  EXPECT_EQ(window.experts_BTL[0][3][1].item<int64_t>(), trace.encoder.expert_ids[6 + 3]);
  EXPECT_EQ(window.hidden_BTD[0][3][2].item<float>(),
            Bf16ToFloat(trace.encoder.hidden[(6 + 3) * 6 + 2]));
  EXPECT_FALSE(WindowOf(trace, Stack::kEncoder, -1, 5).hidden_BTD.defined());
  EXPECT_FALSE(window.context_BTD.defined() || window.source_BSD.defined());
}

TEST(WindowTest, DecoderSeesTheTokenBeforeAndTheEncoder) {
  const auto trace = RandomTrace(SmallGeometry(), 6, 5, 2);
  for (int s = -1; s < 3; ++s) {
    const auto window = WindowOf(trace, Stack::kDecoder, s, 5);
    EXPECT_EQ(window.context_BTD.sizes(), (std::vector<int64_t>{1, 5, 6}));
    EXPECT_TRUE(window.context_BTD[0][0].eq(0).all().item<bool>());
    // Layer 2, the last, of token 2.
    EXPECT_EQ(window.context_BTD[0][3][1].item<float>(),
              Bf16ToFloat(trace.decoder.hidden[(2 * 5 + 2) * 6 + 1]));
    EXPECT_EQ(window.source_BSD.sizes(), (std::vector<int64_t>{1, 6, 6}));
    // Layer 3, the last, of encoder token 5.
    EXPECT_EQ(window.source_BSD[0][5][4].item<float>(),
              Bf16ToFloat(trace.encoder.hidden[(3 * 6 + 5) * 6 + 4]));
    EXPECT_TRUE(window.source_valid_BS.all().item<bool>());
  }
  auto silent = trace;
  silent.encoder.hidden.clear();
  EXPECT_FALSE(WindowOf(silent, Stack::kDecoder, 0, 5).source_BSD.defined());
}

TEST(WindowTest, ABatchMarksThePaddingOfItsSources) {
  const auto both = BatchOf(
      {RandomTrace(SmallGeometry(), 2, 3, 2), RandomTrace(SmallGeometry(), 4, 3, 3)},
      Stack::kDecoder, 0, 5);
  EXPECT_EQ(both.source_BSD.sizes(), (std::vector<int64_t>{2, 4, 6}));
  EXPECT_EQ(both.source_valid_BS.sum(1).select(0, 0).item<int64_t>(), 2);
  EXPECT_EQ(both.source_valid_BS.sum(1).select(0, 1).item<int64_t>(), 4);
}

}  // namespace
}  // namespace routecast
