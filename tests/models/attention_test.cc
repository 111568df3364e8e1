// Attention's own loops against the formula in double precision.
#include "models/attention.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace routecast {
namespace {

constexpr float kLowest = std::numeric_limits<float>::lowest();

struct Shape {
  int64_t batch, heads, queries, keys, depth;
};

at::Tensor Formula(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                   const at::Tensor& bias, at::Tensor* weights = nullptr) {
  const at::Tensor score =
      at::matmul(q.to(at::kDouble), k.to(at::kDouble).transpose(2, 3));
  const at::Tensor softmax = at::softmax(score + bias.to(at::kDouble), -1);
  if (weights != nullptr) *weights = softmax;
  return at::matmul(softmax, v.to(at::kDouble)).transpose(1, 2).flatten(2);
}

// As a projection leaves them: [B,T,H*K] seen as [B,H,T,K].
at::Tensor Heads(const Shape& s, int64_t tokens) {
  return at::randn({s.batch, tokens, s.heads, s.depth}).transpose(1, 2);
}

class AttentionTest : public testing::TestWithParam<Shape> {};

TEST_P(AttentionTest, EqualsTheFormula) {
  const Shape s = GetParam();
  at::manual_seed(11);
  // Scores of about one: rounding in larger ones would be all that is seen.
  const at::Tensor q = Heads(s, s.queries) / std::sqrt(double(s.depth)),
                   k = Heads(s, s.keys), v = Heads(s, s.keys);
  for (const auto& bias :
       {at::randn({1, s.heads, s.queries, s.keys}), at::randn({s.batch, 1, 1, s.keys}),
        at::randn({s.batch, s.heads, s.queries, s.keys}),
        at::randn({s.queries, s.keys, s.heads}).permute({2, 0, 1}).unsqueeze(0),
        at::randn({1, s.heads, s.queries, 1})}) {
    at::Tensor weights, expected_weights;
    const at::Tensor expected = Formula(q, k, v, bias, &expected_weights);
    const at::Tensor got = MultiHeadAttention(q, k, v, bias, /*causal=*/false, &weights);
    EXPECT_TRUE(at::allclose(got.to(at::kDouble), expected, 1e-5, 2e-6));
    EXPECT_TRUE(at::allclose(weights.to(at::kDouble), expected_weights, 2e-6, 1e-7));
    EXPECT_TRUE(at::equal(got, MultiHeadAttention(q, k, v, bias, false, nullptr)));
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, AttentionTest,
                         testing::Values(Shape{2, 3, 128, 128, 64},
                                         Shape{1, 2, 17, 65, 64}, Shape{2, 2, 5, 1, 16},
                                         Shape{1, 1, 4, 63, 5}, Shape{1, 2, 9, 200, 33},
                                         Shape{3, 1, 6, 7, 130}, Shape{1, 2, 1, 40, 64},
                                         Shape{3, 2, 1, 77, 24}, Shape{2, 2, 3, 7, 136},
                                         Shape{1, 2, 2, 9, 5}));

// What makes a sequence in a batch equal to the sequence alone.
TEST(Attention, RowsDoNotDependOnOtherRowsNorOnMaskedKeys) {
  at::manual_seed(12);
  for (const int64_t queries : {23, 3}) {
    const Shape s{2, 2, queries, 40, 64};
    const at::Tensor q = Heads(s, s.queries), k = Heads(s, s.keys), v = Heads(s, s.keys);
    at::Tensor bias = at::zeros({s.batch, 1, 1, s.keys});
    bias.narrow(3, 29, 11).fill_(kLowest);
    const at::Tensor all = MultiHeadAttention(q, k, v, bias, /*causal=*/false, nullptr);
    const int64_t some = queries == 23 ? 7 : 2;
    const at::Tensor alone = MultiHeadAttention(
        q.narrow(0, 1, 1).narrow(2, 1, some), k.narrow(0, 1, 1).narrow(2, 0, 29),
        v.narrow(0, 1, 1).narrow(2, 0, 29), bias.narrow(0, 1, 1).narrow(3, 0, 29),
        /*causal=*/false, nullptr);
    EXPECT_TRUE(at::equal(alone, all.narrow(0, 1, 1).narrow(1, 1, some)));
  }
}

// What lies behind a query is left out, and not a bit of the result shows it.
TEST(Attention, CausalIsTheSameAsTheMaskAlone) {
  at::manual_seed(14);
  for (const Shape s :
       {Shape{1, 2, 131, 131, 64}, Shape{1, 2, 9, 70, 16}, Shape{2, 2, 3, 10, 24}}) {
    const at::Tensor q = Heads(s, s.queries), k = Heads(s, s.keys), v = Heads(s, s.keys);
    const at::Tensor behind =
        at::ones({s.queries, s.keys}, at::kBool).triu(s.keys - s.queries + 1);
    const at::Tensor bias =
        at::randn({1, s.heads, s.queries, s.keys}).masked_fill(behind, kLowest);
    at::Tensor all, seen;
    const at::Tensor masked = MultiHeadAttention(q, k, v, bias, /*causal=*/false, &all);
    EXPECT_TRUE(
        at::equal(MultiHeadAttention(q, k, v, bias, /*causal=*/true, &seen), masked));
    EXPECT_TRUE(at::equal(seen, all));
  }
}

// Padding given apart, of one sequence all of it, is padding in the bias to the bit.
TEST(Attention, AMaskApartIsTheSameAsOneInTheBias) {
  at::manual_seed(15);
  for (const Shape s : {Shape{3, 2, 21, 37, 24}, Shape{3, 2, 2, 37, 24},
                        Shape{3, 1, 4, 16, 5}, Shape{3, 2, 1, 1, 8}}) {
    const at::Tensor q = Heads(s, s.queries), k = Heads(s, s.keys), v = Heads(s, s.keys);
    const at::Tensor bias = at::randn({1, s.heads, s.queries, s.keys});
    at::Tensor mask = at::zeros({s.batch, 1, 1, s.keys});
    mask[1].slice(-1, s.keys / 2).fill_(kLowest);
    mask[2].fill_(kLowest);
    at::Tensor in_bias, apart;
    const at::Tensor expected =
        MultiHeadAttention(q, k, v, bias + mask, /*causal=*/false, &in_bias);
    EXPECT_TRUE(
        at::equal(MultiHeadAttention(q, k, v, bias, false, &apart, mask), expected));
    EXPECT_TRUE(at::equal(apart, in_bias));
    const at::Tensor one = mask.narrow(0, 1, 1);  // of all sequences
    EXPECT_TRUE(at::equal(MultiHeadAttention(q, k, v, bias, false, nullptr, one),
                          MultiHeadAttention(q, k, v, bias + one, false, nullptr)));
  }
}

TEST(Attention, ARowWithoutAnyVisibleKeyIsTheirMean) {
  const Shape s{1, 1, 8, 20, 16};
  const at::Tensor q = Heads(s, s.queries), k = Heads(s, s.keys), v = Heads(s, s.keys);
  const at::Tensor got =
      MultiHeadAttention(q, k, v, at::full({1, 1, 1, s.keys}, kLowest), false, nullptr);
  EXPECT_TRUE(at::allclose(got[0][3], v[0][0].mean(0), 1e-5, 1e-6));
}

// Scores far apart: what lies below the least normal number is nothing, not infinity.
TEST(Attention, LargeScoresNeitherOverflowNorLeak) {
  const Shape s{1, 1, 4, 3, 1};
  const at::Tensor q = at::ones({1, 1, s.queries, 1});
  const at::Tensor k = at::tensor({3e4f, -3e4f, 2.9e4f}).view({1, 1, 3, 1});
  const at::Tensor v = at::tensor({1.f, 1e30f, 1e30f}).view({1, 1, 3, 1});
  EXPECT_TRUE(
      at::equal(MultiHeadAttention(q, k, v, at::zeros({1, 1, 1, 3}), false, nullptr),
                at::ones({1, s.queries, 1})));
}

TEST(Attention, WhatIsNoNumberStaysNone) {
  const Shape s{1, 1, 7, 18, 16};
  at::manual_seed(13);
  const at::Tensor q = Heads(s, s.queries), k = Heads(s, s.keys), v = Heads(s, s.keys);
  q[0][0][2][0] = std::nanf("");
  const at::Tensor got =
      MultiHeadAttention(q, k, v, at::zeros({1, 1, 1, s.keys}), false, nullptr)[0];
  EXPECT_TRUE(got[2].isnan().all().item<bool>());
  EXPECT_FALSE(
      at::cat({got.narrow(0, 0, 2), got.narrow(0, 3, 4)}).isnan().any().item<bool>());
}

TEST(Attention, GradientsFlow) {
  const Shape s{1, 2, 6, 9, 16};
  const at::Tensor q = Heads(s, s.queries).requires_grad_(true), k = Heads(s, s.keys),
                   v = Heads(s, s.keys), bias = at::zeros({1, 1, 1, s.keys});
  MultiHeadAttention(q, k, v, bias, false, nullptr).sum().backward();
  EXPECT_TRUE(q.grad().defined());
}

}  // namespace
}  // namespace routecast
