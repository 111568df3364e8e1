// Nearest neighbours against distances one by one, and the bound that they put on any
// predictor against draws whose best answer is known.
#include "trainer/knn_estimate.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "common/random.h"
#include "tests/trainer/synthetic_traces.h"

namespace routecast {
namespace {

// Against distances one by one.
TEST(KnnEstimateTest, FindsTheNearest) {
  at::manual_seed(2);
  const auto train = at::randn({50, 4}), test = at::randn({9, 4});
  const auto a = at::randint(0, 3, {50}, at::kLong),
             b = at::randint(0, 3, {9}, at::kLong);
  double right = 0, right32 = 0;
  for (int i = 0; i < 9; ++i) {
    std::vector<std::pair<double, int>> all;
    for (int j = 0; j < 50; ++j) {
      all.emplace_back((train[j] - test[i]).square().sum().item<double>(), j);
    }
    std::sort(all.begin(), all.end());
    std::vector<int> votes(3);
    for (int k = 0; k < 32; ++k) ++votes[a[all[size_t(k)].second].item<int64_t>()];
    right += a[all[0].second].item<int>() == b[i].item<int>();
    right32 +=
        std::max_element(votes.begin(), votes.end()) - votes.begin() == b[i].item<int>();
  }
  const KnnEstimate e = ByNeighbours(train, a.unsqueeze(1), test, b.unsqueeze(1), 3);
  EXPECT_NEAR(e.recall_nearest, right / 9, 1e-9);
  EXPECT_NEAR(e.recall_of_32, right32 / 9, 1e-9);
}

TEST(KnnEstimateTest, TheBoundIsCoverAndHarts) {
  // Two experts, an error of .18 = 2 p (1 - p) for p = .1: nobody is right above .9.
  const auto vectors = at::arange(100).to(at::kFloat).unsqueeze(1);
  auto labels = at::zeros({100, 1}, at::kLong);
  auto truth = labels.clone();
  truth.narrow(0, 0, 18).fill_(1);
  EXPECT_NEAR(ByNeighbours(vectors, labels, vectors, truth, 2).bayes_bound, 0.9, 1e-6);
  EXPECT_EQ(ByNeighbours(vectors, labels, vectors, at::ones({100, 1}, at::kLong), 2)
                .bayes_bound,
            1);
}

// Of two experts a token: what the nearest one took, by choice and together.
TEST(KnnEstimateTest, CountsSetsByChoice) {
  const auto vectors = at::arange(4).to(at::kFloat).unsqueeze(1);
  const auto neighbours = at::tensor({0, 1, 2, 3, 4, 5, 0, 5}, at::kLong).view({4, 2});
  // Both in the other order; the first alone; the second alone, as a first; neither.
  const auto truth = at::tensor({1, 0, 2, 0, 1, 4, 1, 2}, at::kLong).view({4, 2});
  const KnnEstimate e = ByNeighbours(vectors, neighbours, vectors, truth, 6);
  EXPECT_THAT(e.nearest_by_choice, testing::ElementsAre(0.5, 0.5));
  EXPECT_DOUBLE_EQ(e.recall_nearest, 0.5);
  const Json json = e.ToJson();
  EXPECT_EQ(json["recall_nearest_by_choice"], Json({0.5, 0.5}));
  EXPECT_FALSE(json.contains("top1_nearest"));
}

// Tokens of three kinds, each with three favourites of eight experts; in six of ten draws
// one of them is replaced by one of the five others. The best answer is the favourites:
// it holds 1 - .6 / 3 of what is taken.
TEST(KnnEstimateTest, TheBoundOfSetsIsWhatTheBestAnswerHolds) {
  constexpr int kExperts = 8, kChosen = 3;
  const auto draw = [](int64_t count, uint64_t seed) {
    const auto vectors = at::empty({count, 2});
    const auto labels = at::empty({count, kChosen}, at::kLong);
    for (int64_t i = 0; i < count; ++i) {
      const auto n = static_cast<uint64_t>(i);
      const auto kind = static_cast<int>(ToRange(Mix(seed, n, 1), 3));
      vectors[i][0] = 10 * kind + ToUnit(Mix(seed, n, 2));
      vectors[i][1] = ToUnit(Mix(seed, n, 3));
      const uint64_t replaced =
          ToUnit(Mix(seed, n, 4)) < 0.6 ? ToRange(Mix(seed, n, 5), kChosen) : kChosen;
      const auto other = static_cast<int>(ToRange(Mix(seed, n, 6), kExperts - kChosen));
      for (int k = 0; k < kChosen; ++k) {
        const bool own = static_cast<uint64_t>(k) != replaced;
        labels[i][k] = (kind + (own ? k : kChosen + other)) % kExperts;
      }
    }
    return std::pair(vectors, labels);
  };
  const auto [train, train_labels] = draw(4000, 1);
  const auto [test, test_labels] = draw(3000, 2);
  const KnnEstimate e = ByNeighbours(train, train_labels, test, test_labels, kExperts);
  // Two draws of one kind share sum p^2 / 3: three of .8, five of .12.
  EXPECT_NEAR(e.recall_nearest, (3 * 0.64 + 5 * 0.0144) / 3, 0.01);
  EXPECT_NEAR(e.recall_of_32, 0.8, 0.01);
  EXPECT_NEAR(e.bayes_bound, 0.8, 0.01);
}

// What of one expert a token was asked for by a model with router inputs is what the
// estimate looks at; without them it looks at the experts.
TEST(KnnEstimateTest, LooksAtWhatTheStoreHas) {
  for (const bool states : {true, false}) {
    SyntheticTraces made =
        TraceSynthesizer(3, 8, 24, 20, 5).Make(40, 6, 24, /*every_hidden=*/true);
    for (RoutingTrace& trace : made.traces) {
      for (RoutingSpan* span : {&trace.encoder, &trace.decoder}) {
        if (!states) span->hidden.clear(), span->hidden_width = 0;
      }
    }
    TraceDataset dataset(made.traces, made.geometry);
    const auto all = EstimateByNeighbours(&dataset, 1);
    EXPECT_EQ(all.size(), 2u + 1 + 3 * 3);  // encoder from 0 and 1, decoder from 0, 1, 2
    for (const KnnEstimate& e : all) {
      EXPECT_EQ(e.features, states ? "router inputs" : "experts");
      EXPECT_GT(e.neighbours, 100);
      const bool same_token = e.phase == Stack::kEncoder || e.layer + e.lead < 3;
      if (same_token) {
        EXPECT_GT(e.recall_nearest, 0.3) << e.layer << " " << e.lead;
      }
    }
  }
}

// Capacity dropped every token of the decoder's last layer: of its targets nothing is
// estimated, and no 0 % goes into means.
TEST(KnnEstimateTest, OfNoLabelsThereIsNoEstimate) {
  SyntheticTraces made =
      TraceSynthesizer(3, 8, 24, 20, 5).Make(40, 6, 24, /*every_hidden=*/true);
  for (RoutingTrace& trace : made.traces) {
    RoutingSpan& s = trace.decoder;
    s.dropped.assign(s.expert_ids.size(), 0);
    std::fill(s.dropped.begin() + 2 * s.num_tokens, s.dropped.end(), uint8_t{1});
  }
  TraceDataset dataset(made.traces, made.geometry);
  size_t decoder = 0;
  for (const KnnEstimate& e : EstimateByNeighbours(&dataset, 1)) {
    EXPECT_GT(e.samples, 0) << e.layer << " " << e.lead;
    decoder += e.phase == Stack::kDecoder;
  }
  EXPECT_EQ(decoder, 3u * 2);  // the other two layers, from each
}

}  // namespace
}  // namespace routecast
