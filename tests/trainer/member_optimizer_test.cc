// Members of an ensemble are stepped together, and each as if alone.
#include "trainer/member_optimizer.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/errors.h"
#include "models/ensemble_model.h"

namespace routecast {
namespace {

SpeculationConfig TinyEnsemble() {
  const MoeGeometry g{3, 2, 5, 1, 6};
  SpeculationConfig c = DefaultSpeculationConfig("ensemble", g, 11, 0);
  for (SpeculationConfig& m : c.members) {
    m.width = 8;
    m.heads = 2;
    m.ff = 16;
    m.layers = 1;
    m.dropout = 0;
    m.priors = false;
  }
  return c;
}

RoutingWindow TinyWindow() {
  RoutingWindow w;
  w.stack = Stack::kDecoder;
  w.source_layer = 0;
  w.num_layers = 2;
  w.num_experts = 5;
  w.token_ids_BT = at::arange(8).view({2, 4});
  w.valid_BT = at::ones({2, 4}, at::kBool);
  w.experts_BTL = at::arange(16).view({2, 4, 2}).remainder(5);
  return w;
}

// Members with rates, decays and clips of their own, stepped together, end as each does
// alone: losses within 1e-5 over 20 steps.
TEST(MemberOptimizerTest, MembersStepAsTheyWouldAlone) {
  const SpeculationConfig config = TinyEnsemble();
  std::vector<MemberOptions> training = {
      {3e-3, 0.1, 0.05, 0}, {1e-2, 0, 1, 0}, {1e-3, 0.2, 0.01, 0}};
  const auto together = MakeSpeculationModel(config, 9);
  std::vector<std::unique_ptr<SpeculationModel>> alone;
  std::vector<MemberOptimizer> optimizers;
  for (int64_t m = 0; m < 3; ++m) {
    alone.push_back(MakeSpeculationModel(config.members[size_t(m)], MemberSeed(9, m)));
    optimizers.emplace_back(*alone.back(), std::vector{training[size_t(m)]}, .9, .99, 0);
  }
  MemberOptimizer optimizer(*together, training, .9, .99, 0);
  const auto labels = at::arange(16).view({2, 4, 2}).remainder(5);
  const auto loss_of = [&](const SpeculationOutput& out) {
    return at::cross_entropy_loss(out.logits_BTHE.reshape({-1, 5}), labels.flatten());
  };
  const auto clear = [](const SpeculationModel& model) {
    for (const auto& [name, tensor] : model.parameters().items()) {
      at::Tensor(tensor).mutable_grad() = at::zeros_like(tensor);
    }
  };
  for (int step = 0; step < 20; ++step) {
    clear(*together);
    const auto outputs = together->ForwardMembers(TinyWindow(), 0);
    at::Tensor total;
    std::vector<double> losses;
    for (const auto& out : outputs) {
      const auto loss = loss_of(out);
      losses.push_back(loss.item<double>());
      total = total.defined() ? total + loss : loss;
    }
    total.backward();
    optimizer.Step(1);
    for (size_t m = 0; m < 3; ++m) {
      clear(*alone[m]);
      const auto loss = loss_of(alone[m]->Forward(TinyWindow(), 0));
      EXPECT_NEAR(losses[m], loss.item<double>(), 1e-5 * loss.item<double>())
          << "member " << m << " step " << step;
      loss.backward();
      optimizers[m].Step(1);
    }
  }
}

TEST(MemberOptimizerTest, ABrokenGradientIsNamedAndChangesNothing) {
  const auto model = MakeSpeculationModel(TinyEnsemble(), 9);
  MemberOptimizer optimizer(*model, std::vector<MemberOptions>(3), .9, .99, 0);
  for (const auto& [name, tensor] : model->parameters().items()) {
    at::Tensor(tensor).mutable_grad() = at::zeros_like(tensor);
  }
  const auto& broken = model->parameters().Get("group.0.head.mid.bias");
  const auto before = broken.detach().clone();
  broken.grad().fill_(NAN);
  try {
    optimizer.Step(1);
    optimizer.RequireFinite();
    FAIL();
  } catch (const std::logic_error& e) {
    EXPECT_THAT(e.what(), testing::HasSubstr("head.mid.bias"));
  }
  EXPECT_TRUE(at::equal(broken, before));
}

TEST(MemberOptimizerTest, AveragesFollowAndSwap) {
  const c10::NoGradGuard no_grad;
  const auto model = MakeSpeculationModel(TinyEnsemble(), 9);
  MemberOptimizer optimizer(*model, std::vector<MemberOptions>(3, {0.1, 0, 1, 0}), .9,
                            .99, 0.75);
  for (const auto& [name, tensor] : model->parameters().items()) {
    at::Tensor(tensor).mutable_grad() = at::ones_like(tensor);
  }
  const auto& w = model->parameters().Get("group.0.norm.bias");
  const auto start = w.detach().clone();
  optimizer.Step(1);
  const auto one = w.detach().clone();
  optimizer.Step(1);
  const auto two = w.detach().clone();
  const auto expected = (start * .75 + one * .25) * .75 + two * .25;
  optimizer.SwapAverages();
  EXPECT_TRUE(at::allclose(w, expected, 1e-5, 1e-6));
  optimizer.SwapAverages();
  EXPECT_TRUE(at::equal(w, two));
}

}  // namespace
}  // namespace routecast
