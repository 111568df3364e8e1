// The one-pass norm against the formula in double precision.
#include "models/rms_norm.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

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

// To the bit, in rows of whole vectors and with a rest; a number that is none stays none.
TEST(RmsNorm, Bfloat16RoundsAsTheLibraryDoes) {
  at::manual_seed(4);
  for (const int64_t width : {5, 48, 100, 768}) {
    // Powers of two: the mean and the scale are exact, so only roundings differ.
    at::Tensor x = at::full({2, width}, 4).to(at::kBFloat16);
    const at::Tensor gain = at::randn({width}).to(at::kBFloat16);
    const at::Tensor got = RmsNorm(x, gain, 0);
    EXPECT_TRUE(at::equal(got, gain.expand({2, width}))) << width;
    x[1][width - 1] = std::nanf("");
    EXPECT_TRUE(RmsNorm(x, gain, 0)[1].isnan().all().item<bool>()) << width;
    EXPECT_TRUE(at::equal(RmsNorm(x, gain, 0)[0], gain)) << width;
  }
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
