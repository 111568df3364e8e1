// The losses of conditional generation: what is left out, and that gradients flow.
#include "models/switch_losses.h"

#include <gtest/gtest.h>

#include "tests/models/switch_test_support.h"

namespace routecast {
namespace {

struct Inputs {
  at::Tensor ids = at::randint(2, 96, {2, 9}, at::kLong);
  at::Tensor valid = at::ones({2, 9}, at::kBool);
  at::Tensor labels = at::randint(2, 96, {2, 6}, at::kLong);
};

TEST(ShiftRight, StartsWithTheStartTokenAndPadsIgnoredLabels) {
  SwitchConfig config = SmallConfig();
  config.decoder_start_token_id = 7;
  config.pad_token_id = 3;
  const at::Tensor labels = at::tensor({5, 6, -100, 8}, at::kLong).unsqueeze(0);
  EXPECT_TRUE(at::equal(ShiftRight(config, labels),
                        at::tensor({7, 5, 6, 3}, at::kLong).unsqueeze(0)));
}

TEST(SwitchLosses, IgnoredLabelsDoNotCount) {
  ResidentModel model(RandomCheckpoint(SmallConfig(), 21));
  Inputs in;
  in.labels.narrow(1, 4, 2).fill_(kIgnoredLabel);
  const ConditionalLosses losses =
      ComputeLosses(&model.model(), in.ids, in.valid, in.labels);
  const at::Tensor log_probs = at::log_softmax(losses.logits_BTV, -1);
  double sum = 0;
  for (int64_t b = 0; b < 2; ++b) {
    for (int64_t t = 0; t < 4; ++t) {
      sum -= log_probs[b][t][in.labels[b][t].item<int64_t>()].item<double>();
    }
  }
  EXPECT_NEAR(losses.cross_entropy.item<double>(), sum / 8, 1e-5);
}

TEST(SwitchLosses, EvenRoutingHasAuxiliaryLossOne) {
  // Token t goes to expert t, with certainty: shares and probabilities are 1/4 each.
  const at::Tensor logits = (at::eye(4) * 100).unsqueeze(0);
  EXPECT_NEAR(LoadBalancingLoss(logits).item<double>(), 1, 1e-6);
  EXPECT_NEAR(LoadBalancingLoss(logits.select(1, 0).unsqueeze(1)).item<double>(), 4,
              1e-6);
  EXPECT_NEAR(RouterZLoss(logits).item<double>(), 100 * 100, 1e-2);
}

TEST(SwitchLosses, AStackWhoseStepIsOneHasNoRouterLoss) {
  SwitchConfig config = SmallConfig();
  config.encoder_sparse_step = 1;
  config.router_z_loss_coef = 2;
  config.router_aux_loss_coef = 3;
  ResidentModel model(RandomCheckpoint(config, 22));
  const Inputs in;
  const ConditionalLosses l = ComputeLosses(&model.model(), in.ids, in.valid, in.labels);
  EXPECT_EQ(l.encoder_z.item<double>(), 0);
  EXPECT_EQ(l.encoder_aux.item<double>(), 0);
  EXPECT_GT(l.decoder_z.item<double>(), 0);
  const double expected = l.cross_entropy.item<double>() +
                          2 * l.decoder_z.item<double>() +
                          3 * l.decoder_aux.item<double>();
  EXPECT_NEAR(l.total.item<double>(), expected, 1e-3);
}

TEST(SwitchLosses, GradientsReachExpertsAndRouters) {
  Checkpoint c = RandomCheckpoint(SmallConfig(), 23);
  for (const at::Tensor& tensor : c.parameters.tensors()) tensor.requires_grad_(true);
  ResidentModel model(c);
  const Inputs in;
  ComputeLosses(&model.model(), in.ids, in.valid, in.labels).total.backward();
  int experts = 0;
  for (const auto& [name, tensor] : c.parameters.items()) {
    const bool has =
        tensor.grad().defined() && tensor.grad().abs().sum().item<double>() > 0;
    if (name.find("router") != std::string::npos) {
      EXPECT_TRUE(has) << name;
    }
    experts += IsExpertTensor(name) && has;
  }
  EXPECT_GT(experts, 4);
}

TEST(SwitchLosses, TheObserverSeesBothPasses) {
  ResidentModel model(RandomCheckpoint(SmallConfig(), 24));
  const Inputs in;
  RoutingLog log;
  ForwardOptions options;
  options.observer = &log;
  ComputeLosses(&model.model(), in.ids, in.valid, in.labels, options);
  EXPECT_EQ(log.passes.size(), 2u);
  EXPECT_EQ(static_cast<int>(log.routings.size()), model.model().geometry().num_layers());
}

}  // namespace
}  // namespace routecast
