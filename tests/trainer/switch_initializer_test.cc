// A Switch Transformer's first weights.
#include "trainer/switch_initializer.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "trainer/pretrain_options.h"

namespace routecast {
namespace {

constexpr char kRouter[] = "encoder.block.1.layer.1.mlp.router.classifier.weight";

SwitchConfig Tiny() {
  SwitchConfig config = PretrainPreset("demo").model;
  config.vocab_size = 40;
  return config;
}

// On normed inputs, whose numbers have a mean square of 1.
TEST(SwitchInitializer, RouterLogitsBeginWithTheDeviationAskedFor) {
  at::manual_seed(1);
  const at::Tensor x = at::randn({400, Tiny().d_model});
  for (const double deviation : {2.0, 5.5}) {
    const Parameters first = InitialParameters(Tiny(), deviation, 3);
    const at::Tensor logits = at::matmul(x, first.Get(kRouter).detach().t());
    EXPECT_NEAR(logits.std().item<double>(), deviation, 0.1 * deviation);
  }
}

TEST(SwitchInitializer, NothingButRoutersDependsOnIt) {
  const Parameters a = InitialParameters(Tiny(), 2, 3),
                   b = InitialParameters(Tiny(), 4, 3);
  for (const auto& [name, tensor] : a.items()) {
    const bool router = name.find("router") != std::string::npos;
    EXPECT_EQ(at::equal(tensor, b.Get(name)), !router) << name;
  }
}

}  // namespace
}  // namespace routecast
