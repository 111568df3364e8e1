// The norm on every device and in every type against the formula in double precision.
#include "models/rms_norm.h"
#include "tests/models/device_test.h"

namespace routecast {
namespace {

class NormKernel : public DeviceTest {};
ROUTECAST_INSTANTIATE_DEVICES(NormKernel);

TEST_P(NormKernel, EqualsTheFormula) {
  at::manual_seed(3);
  for (at::ScalarType type : {at::kFloat, at::kBFloat16, at::kHalf}) {
    for (int64_t width : {1, 7, 48, 100, 768}) {
      const at::Tensor x = (7 * at::randn({3, 5, width})).to(type);
      const at::Tensor gain = at::randn({width}).to(type);
      const at::Tensor d = x.to(at::kDouble);
      const at::Tensor want =
          d / at::sqrt(d.pow(2).mean(-1, true) + 1e-6) * gain.to(at::kDouble);
      const at::Tensor got = RmsNorm(On(x), On(gain), 1e-6);
      EXPECT_EQ(got.scalar_type(), type);
      // Two roundings: of the quotient and of the product.
      const double unit = type == at::kFloat ? 1e-5 : type == at::kHalf ? 2e-3 : 1.6e-2;
      EXPECT_TRUE(at::allclose(got.to(at::kCPU, at::kDouble), want, unit, 1e-6))
          << type << " " << width;
    }
  }
}

TEST_P(NormKernel, NoRowsGiveNone) {
  EXPECT_EQ(RmsNorm(On(at::zeros({2, 0, 8})), On(at::ones({8})), 1e-6).numel(), 0);
}

}  // namespace
}  // namespace routecast
