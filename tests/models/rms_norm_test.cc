// The one-pass norm against the formula in double precision.
#include "models/rms_norm.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace routecast {
namespace {

constexpr double kEpsilon = 1e-6;

at::Tensor Formula(const at::Tensor& x, const at::Tensor& gain) {
  const at::Tensor d = x.to(at::kDouble);
  return d / at::sqrt(d.pow(2).mean(-1, true) + kEpsilon) * gain.to(at::kDouble);
}

class RmsNormTest : public testing::TestWithParam<int64_t> {};

TEST_P(RmsNormTest, EqualsTheFormula) {
  at::manual_seed(3);
  const at::Tensor x = at::randn({3, 5, GetParam()}) * 7, gain = at::randn({GetParam()});
  EXPECT_TRUE(at::allclose(RmsNorm(x, gain, kEpsilon).to(at::kDouble), Formula(x, gain),
                           1e-5, 1e-6));
}

INSTANTIATE_TEST_SUITE_P(Widths, RmsNormTest, testing::Values(1, 7, 16, 48, 100, 768));

TEST(RmsNorm, GradientsFlowAndAgree) {
  const at::Tensor x = at::randn({4, 32}), gain = at::randn({32}).requires_grad_(true);
  const at::Tensor traced = RmsNorm(x, gain, kEpsilon);
  traced.sum().backward();
  EXPECT_TRUE(gain.grad().defined());
  EXPECT_TRUE(at::allclose(traced, RmsNorm(x, gain.detach(), kEpsilon), 1e-5, 1e-6));
}

// The quotient is rounded before the product with the gain.
TEST(RmsNorm, Bfloat16RoundsTheQuotientFirst) {
  const at::Tensor x = at::randn({4, 32}).to(at::kBFloat16);
  const at::Tensor gain = at::randn({32}).to(at::kBFloat16);
  const at::Tensor wide = x.to(at::kFloat);
  const at::Tensor quotient =
      (wide * at::rsqrt(wide.pow(2).mean(-1, true) + kEpsilon)).to(at::kBFloat16);
  EXPECT_TRUE(at::equal(RmsNorm(x, gain, kEpsilon), gain * quotient));
}

TEST(RmsNorm, StridedInputIsNotMisread) {
  const at::Tensor x = at::randn({32, 4}).t(), gain = at::randn({32});
  EXPECT_TRUE(at::allclose(RmsNorm(x, gain, kEpsilon).to(at::kDouble), Formula(x, gain),
                           1e-5, 1e-6));
}

}  // namespace
}  // namespace routecast
