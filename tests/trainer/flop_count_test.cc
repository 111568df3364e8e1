// Products whose work is known.
#include "trainer/flop_count.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include <stdexcept>

#include "models/onednn_linear.h"
#include "tests/models/speculation_test_support.h"

namespace routecast {
namespace {

TEST(MatrixFlops, CountsEachProductOnce) {
  const at::Tensor a = at::ones({3, 4}), b = at::ones({4, 5}), w = at::ones({5, 4});
  EXPECT_EQ(MatrixFlops([&] { at::mm(a, b); }), 2u * 3 * 4 * 5);
  EXPECT_EQ(MatrixFlops([&] { at::matmul(a, b); }), 2u * 3 * 4 * 5);
  EXPECT_EQ(MatrixFlops([&] { at::linear(a, w, at::ones({5})); }), 2u * 3 * 4 * 5);
  EXPECT_EQ(MatrixFlops([&] { at::linear(at::ones({2, 3, 4}), w); }), 2u * 6 * 4 * 5);
  EXPECT_EQ(MatrixFlops([&] { at::matmul(a, at::ones({4})); }), 2u * 3 * 4);
}

TEST(MatrixFlops, CountsBatchesAndAttention) {
  const at::Tensor a = at::ones({7, 3, 4}), b = at::ones({7, 4, 5});
  EXPECT_EQ(MatrixFlops([&] { at::bmm(a, b); }), 2u * 7 * 3 * 4 * 5);
  EXPECT_EQ(MatrixFlops([&] {
              at::baddbmm(at::ones({7, 3, 5}), a, b);
            }),
            2u * 7 * 3 * 4 * 5);
  const at::Tensor q = at::ones({1, 2, 6, 8}), k = at::ones({1, 2, 9, 8});
  EXPECT_EQ(MatrixFlops([&] { at::scaled_dot_product_attention(q, k, k); }),
            2u * 2 * 2 * 6 * 9 * 8);
}

TEST(MatrixFlops, CountsTheOtherLibrarysProducts) {
  if (!PrefersOneDnn()) GTEST_SKIP() << "no AMD machine with AVX-512";
  const at::Tensor x = at::ones({128, 16}), w = at::ones({8, 16});
  EXPECT_EQ(MatrixFlops([&] { OneDnnLinear(x, w); }), 2u * 128 * 16 * 8);
}

TEST(MatrixFlops, SumsAreNotCountedAndNothingStaysBehind) {
  const at::Tensor a = at::ones({3, 3});
  EXPECT_EQ(MatrixFlops([&] { at::relu(a + a).sum(); }), 0u);
  EXPECT_THROW(MatrixFlops([] { throw std::runtime_error("x"); }), std::runtime_error);
  EXPECT_EQ(MatrixFlops([&] { at::mm(a, a); }), 54u);
}

// Work, not time: asked token by token, a decoder's sequence costs no more than one pass
// over it, where a pass a question costs twenty times as much.
TEST(MatrixFlops, ServingASequenceCostsNoMoreThanOnePassOverIt) {
  constexpr int64_t kTokens = 40;
  const c10::NoGradGuard no_grad;
  const auto window =
      WindowOf(RandomTrace(SmallGeometry(), 4, kTokens, 3), Stack::kDecoder, 1, 5);
  for (const std::string& kind : SpeculationKinds()) {
    const auto model = MakeSpeculationModel(SmallSpeculation(kind), 7);
    if (!model->keeps_tokens()) continue;
    const uint64_t whole = MatrixFlops([&] { model->Forward(window, 0); });
    model->PrepareServing();
    uint64_t asked = 0;
    for (int64_t t = 1; t <= kTokens; ++t) {
      RoutingWindow known = window;
      for (at::Tensor* rows : {&known.token_ids_BT, &known.valid_BT, &known.experts_BTL,
                               &known.hidden_BTD, &known.context_BTD}) {
        *rows = rows->narrow(1, 0, t).contiguous();
      }
      asked += MatrixFlops([&] { model->ForwardLast(known); });
    }
    EXPECT_GT(asked, 0u) << kind;
    EXPECT_LE(asked, whole) << kind;
  }
}

}  // namespace
}  // namespace routecast
