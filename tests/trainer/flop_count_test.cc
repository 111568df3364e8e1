// Products whose work is known.
#include "trainer/flop_count.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <stdexcept>

#include "models/onednn_linear.h"

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

}  // namespace
}  // namespace routecast
