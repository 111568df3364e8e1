// Experts looked up on the device against one product at a time.
#include "models/expert_gemv.h"

#include <cmath>
#include <utility>
#include <vector>

#include "models/expert_execution.h"
#include "tests/models/device_test.h"

namespace routecast {
namespace {

class ExpertGemvTest : public DeviceTest {};
ROUTECAST_INSTANTIATE_DEVICES(ExpertGemvTest);

constexpr int64_t kExperts = 5;
constexpr std::pair<int64_t, int64_t> kWidths[] = {{40, 72}, {7, 33}};

std::vector<ExpertWeights> Layer(int64_t d, int64_t f, bool gated, at::ScalarType type,
                                 at::Device device) {
  std::vector<ExpertWeights> layer;
  for (int64_t e = 0; e < kExperts; ++e) {
    const auto make = [&](int64_t rows, int64_t columns) {
      return (at::randn({rows, columns}) / std::sqrt(double(columns)))
          .to(type)
          .to(device);
    };
    layer.push_back({make(f, d), make(d, f), gated ? make(f, d) : at::Tensor()});
  }
  return layer;
}

// Widths of whole 16-byte words and of others.
TEST_P(ExpertGemvTest, EqualsOneTokenAfterTheOther) {
  at::manual_seed(1);
  const at::Tensor ids = at::tensor({4, 0, 0, 3, 4, 1, 2}, at::kLong);
  for (at::ScalarType type : {at::kFloat, at::kBFloat16, at::kHalf}) {
    for (const auto& [d, f] : kWidths) {
      for (const char* act : {"relu", "gelu", "gelu_new", "silu"}) {
        for (bool gated : {false, true}) {
          const Activation activation = *FindActivation(act);
          const std::vector<ExpertWeights> layer = Layer(d, f, gated, type, device());
          const at::Tensor x = On(at::randn({7, d}).to(type));
          const at::Tensor got = ExpertGemv(activation, TableOf(layer), x, On(ids));
          for (int64_t i = 0; i < 7; ++i) {
            const auto e = static_cast<size_t>(ids[i].item<int64_t>());
            const at::Tensor want =
                ApplyFeedForward(activation, layer[e], x.narrow(0, i, 1))[0];
            const double unit = type == at::kFloat  ? 1e-5
                                : type == at::kHalf ? 4e-3
                                                    : 3e-2;
            EXPECT_TRUE(
                at::allclose(got[i].to(at::kFloat), want.to(at::kFloat), unit, unit))
                << type << " " << d << " " << act << (gated ? " gated" : "");
          }
        }
      }
    }
  }
}

TEST_P(ExpertGemvTest, ATokenWhoseExpertIsNotThereGetsNoNumbersAndNoOtherDoes) {
  const std::vector<ExpertWeights> layer = Layer(16, 24, false, at::kFloat, device());
  ExpertTable table = TableOf(layer);
  table.addresses_E3[2].zero_();
  const at::Tensor ids = On(at::tensor({1, 2, 3}, at::kLong));
  const at::Tensor got =
      ExpertGemv(Activation::kRelu, table, On(at::randn({3, 16})), ids).to(at::kCPU);
  EXPECT_TRUE(at::isnan(got[1]).all().item<bool>());
  EXPECT_FALSE(at::isnan(got[0]).any().item<bool>());
  EXPECT_FALSE(at::isnan(got[2]).any().item<bool>());
}

TEST_P(ExpertGemvTest, ATokenOfNoExpertKeepsItsRow) {
  const std::vector<ExpertWeights> layer = Layer(16, 24, true, at::kFloat, device());
  const ExpertTable table = TableOf(layer);
  const at::Tensor x = On(at::randn({3, 16})), out = On(at::full({3, 16}, 7.0f));
  const auto run = [&](std::initializer_list<int64_t> ids) {
    ExpertGemvInto(Activation::kRelu, table, x, On(at::tensor(at::IntArrayRef(ids))),
                   out);
  };
  run({-1, 2, -1});
  EXPECT_TRUE(at::equal(out[0], On(at::full({16}, 7.0f))));
  EXPECT_TRUE(at::equal(out[2], out[0]));
  // In turns as at once, bit by bit.
  run({4, -1, 0});
  EXPECT_TRUE(at::equal(out, ExpertGemv(Activation::kRelu, table, x,
                                        On(at::tensor({4, 2, 0}, at::kLong)))));
}

TEST_P(ExpertGemvTest, NoTokenGivesNoRow) {
  const std::vector<ExpertWeights> layer = Layer(16, 24, true, at::kFloat, device());
  const at::Tensor got =
      ExpertGemv(Activation::kRelu, TableOf(layer), On(at::zeros({0, 16})),
                 On(at::zeros({0}, at::kLong)));
  EXPECT_EQ(got.sizes(), (std::vector<int64_t>{0, 16}));
}

TEST_P(ExpertGemvTest, ATableOfWeightsThatAreNotAlikeIsADefect) {
  std::vector<ExpertWeights> layer = Layer(16, 24, false, at::kFloat, device());
  layer[3].wo_DF = layer[3].wo_DF.to(at::kBFloat16);
  EXPECT_THROW(TableOf(layer), std::logic_error);
  layer[3].wo_DF = On(at::randn({24, 16})).t();
  EXPECT_THROW(TableOf(layer), std::logic_error);
  layer[3].wo_DF = On(at::randn({16, 25}));
  EXPECT_THROW(TableOf(layer), std::logic_error);
  // Rows of whole words that begin between two; others may.
  layer[3].wo_DF = On(at::randn({16 * 24 + 1})).narrow(0, 1, 16 * 24).view({16, 24});
  EXPECT_THROW(TableOf(layer), std::logic_error);
  layer = Layer(7, 33, false, at::kFloat, device());
  layer[3].wo_DF = On(at::randn({7 * 33 + 1})).narrow(0, 1, 7 * 33).view({7, 33});
  EXPECT_NO_THROW(TableOf(layer));
}

}  // namespace
}  // namespace routecast
