// Routing and dispatch against slow and obvious loops: ties, capacity, padding, experts.
#include <gtest/gtest.h>

#include "models/relative_position.h"
#include "models/top1_router.h"
#include "tests/models/switch_test_support.h"

namespace routecast {
namespace {

// Each token through its expert alone.
class PerTokenExecutor : public ExpertExecutor {
 public:
  PerTokenExecutor(const Checkpoint& c)
      : g_(c.config.geometry()),
        activation_(c.config.activation),
        weights_(ExpertWeightsOf(c.config, c.parameters)) {}
  Activation activation() const override { return activation_; }
  at::Tensor Run(int layer, const at::Tensor& tokens, const at::Tensor& ids) override {
    std::vector<at::Tensor> rows;
    for (int64_t i = 0; i < tokens.size(0); ++i) {
      const ExpertKey key{layer, static_cast<int>(ids[i].item<int64_t>())};
      const ExpertWeights& w = weights_[static_cast<size_t>(key.Index(g_))];
      at::Tensor inner = Activate(activation_, at::mv(w.wi_FD, tokens[i]));
      if (w.gate_FD.defined()) inner = inner * at::mv(w.gate_FD, tokens[i]);
      rows.push_back(at::mv(w.wo_DF, inner));
    }
    return at::stack(rows);
  }

 private:
  MoeGeometry g_;
  Activation activation_;
  std::vector<ExpertWeights> weights_;
};

// Position by position: an expert takes a sequence's first `capacity` tokens.
at::Tensor DroppedByLoop(const at::Tensor& ids, int64_t experts, int64_t capacity,
                         const at::Tensor& counted) {
  at::Tensor dropped = at::zeros(ids.sizes(), at::kBool);
  for (int64_t b = 0; b < ids.size(0); ++b) {
    std::vector<int64_t> taken(static_cast<size_t>(experts), 0);
    for (int64_t t = 0; t < ids.size(1); ++t) {
      if (counted.defined() && !counted[b][t].item<bool>()) {
        dropped[b][t] = true;
        continue;
      }
      int64_t& n = taken[static_cast<size_t>(ids[b][t].item<int64_t>())];
      dropped[b][t] = ++n > capacity;
    }
  }
  return dropped;
}

struct Inputs {
  at::Tensor ids = at::randint(2, 96, {3, 14}, at::kLong);
  at::Tensor valid = at::arange(14).unsqueeze(0) < at::tensor({14, 9, 5}).unsqueeze(1);
};

TEST(Dispatch, GroupedExpertsEqualAPerTokenLoop) {
  for (const char* act : {"relu", "gelu", "gelu_new", "silu"}) {
    for (bool gated : {false, true}) {
      SwitchConfig config = SmallConfig();
      config.activation = *FindActivation(act);
      config.is_gated_act = gated;
      const Checkpoint c = RandomCheckpoint(config, 1);
      ResidentExpertSource source(config.geometry(),
                                  ExpertWeightsOf(config, c.parameters));
      LocalExpertExecutor fast(&source, config.activation);
      PerTokenExecutor slow(c);
      const at::Tensor tokens = at::randn({60, config.d_model});
      const at::Tensor ids = at::randint(0, config.num_experts, {60}, at::kLong);
      for (int layer = 0; layer < config.geometry().num_layers(); ++layer) {
        EXPECT_TRUE(at::allclose(fast.Run(layer, tokens, ids),
                                 slow.Run(layer, tokens, ids), 1e-4, 1e-4))
            << act << (gated ? " gated" : "") << " layer " << layer;
      }
    }
  }
}

TEST(Dispatch, AGatedModelEqualsAPerTokenLoop) {
  SwitchConfig config = SmallConfig();
  config.activation = Activation::kSilu;
  config.is_gated_act = true;
  config.expert_capacity = 2;
  const Checkpoint c = RandomCheckpoint(config, 2);
  ResidentModel fast(c);
  PerTokenExecutor executor(c);
  SwitchModel slow(config, c.parameters, &executor);
  const Inputs in;
  EXPECT_TRUE(at::allclose(fast.model().Encode(in.ids, in.valid),
                           slow.Encode(in.ids, in.valid), 1e-4, 1e-4));
}

TEST(Dispatch, AnExecutorWithAnotherActivationIsADefect) {
  SwitchConfig config = SmallConfig();
  config.activation = Activation::kSilu;
  const Checkpoint c = RandomCheckpoint(config, 3);
  LocalExpertExecutor executor(nullptr);
  EXPECT_THROW(SwitchModel(config, c.parameters, &executor), std::logic_error);
}

TEST(Capacity, EqualsAPositionByPositionCount) {
  at::manual_seed(4);
  const at::Tensor ids = at::randint(0, 3, {5, 20}, at::kLong);
  const at::Tensor counted = at::rand({5, 20}) < 0.7;
  for (int64_t capacity : {0, 1, 2, 5, 19, 20, 21}) {
    for (const at::Tensor& who : {at::Tensor(), counted}) {
      EXPECT_TRUE(at::equal(DroppedByCapacity(ids, 3, capacity, who),
                            DroppedByLoop(ids, 3, capacity, who)))
          << "capacity " << capacity;
    }
  }
}

TEST(Capacity, ExactlyFullKeepsAllAndOneMoreDropsTheLast) {
  const at::Tensor ids = at::full({1, 4}, 2, at::kLong);
  EXPECT_FALSE(DroppedByCapacity(ids, 3, 4, {}).any().item<bool>());
  EXPECT_TRUE(at::equal(DroppedByCapacity(ids, 3, 3, {}),
                        at::tensor({0, 0, 0, 1}).to(at::kBool).unsqueeze(0)));
}

TEST(Capacity, SequencesDoNotShareIt) {
  const at::Tensor ids = at::zeros({2, 3}, at::kLong);
  const at::Tensor dropped = DroppedByCapacity(ids, 2, 2, {});
  EXPECT_TRUE(at::equal(dropped[0], dropped[1]));
  EXPECT_EQ(dropped.sum().item<int64_t>(), 2);
}

TEST(Capacity, WithoutAnyTheResidualAloneIsLeft) {
  SwitchConfig config = SmallConfig();
  config.expert_capacity = 0;
  const Checkpoint c = RandomCheckpoint(config, 5);
  Checkpoint silent = c;  // experts that add nothing
  Parameters parameters;
  for (const auto& [name, tensor] : c.parameters.items()) {
    parameters.Add(name, IsExpertTensor(name) ? at::zeros_like(tensor) : tensor);
  }
  silent.parameters = parameters;
  silent.config.expert_capacity = 64;
  ResidentModel none(c), zero(silent);
  const Inputs in;
  EXPECT_TRUE(at::equal(none.model().Encode(in.ids, in.valid),
                        zero.model().Encode(in.ids, in.valid)));
}

// Logits of two experts nearer than bf16 tells apart: the second is the larger one.
TEST(Top1, TheArgmaxIsTakenInTheModelsDtypeAndTheLowestIndexWinsATie) {
  const at::Tensor weight = at::tensor({1.0, 1.0005, 0.2}).to(at::kFloat).unsqueeze(1);
  const at::Tensor input = at::ones({1, 1, 1});
  const auto chosen = [&](at::ScalarType dtype) {
    return ChooseTop1(input, weight, {}, dtype).expert_ids_BT.item<int64_t>();
  };
  EXPECT_EQ(chosen(at::kFloat), 1);
  EXPECT_EQ(chosen(at::kBFloat16), 0);
}

TEST(Top1, ARouterInBf16TiesEvenInAnFp32Model) {
  const at::Tensor weight = at::tensor({1.0, 1.0005, 0.2}).to(at::kBFloat16).unsqueeze(1);
  const at::Tensor input = at::ones({1, 1, 1}, at::kBFloat16);
  const Top1Choice choice = ChooseTop1(input, weight, {}, at::kFloat);
  EXPECT_EQ(choice.expert_ids_BT.item<int64_t>(), 0);
  EXPECT_EQ(choice.gate_probs_BT.scalar_type(), at::kFloat);
  EXPECT_EQ(choice.logits_BTE.scalar_type(), at::kFloat);
}

TEST(Top1, TheBiasDecides) {
  const at::Tensor weight = at::zeros({3, 2}), input = at::ones({1, 1, 2});
  const at::Tensor bias = at::tensor({0.0, 0.0, 1.0}).to(at::kFloat);
  EXPECT_EQ(ChooseTop1(input, weight, bias, at::kFloat).expert_ids_BT.item<int64_t>(), 2);
  EXPECT_EQ(ChooseTop1(input, weight, {}, at::kFloat).expert_ids_BT.item<int64_t>(), 0);
}

// All tokens go to one expert of capacity 4; padding stands before real tokens, as it
// does where prompts are padded on the left.
TEST(IgnorePadding, DecidesWhetherPaddingSpendsCapacity) {
  class AllToOne : public RoutingOverride {
    void Replace(int, at::Tensor* ids, at::Tensor*) override { ids->fill_(1); }
  } to_one;
  SwitchConfig config = SmallConfig();
  config.expert_capacity = 4;
  config.router_ignore_padding_tokens = true;  // read by nobody, as in the reference
  ResidentModel model(RandomCheckpoint(config, 6));
  const at::Tensor ids = at::randint(2, 96, {1, 7}, at::kLong);
  const at::Tensor valid = at::arange(7).unsqueeze(0) >= 3;
  const auto dropped = [&](bool ignore_padding) {
    RoutingLog log;
    ForwardOptions options;
    options.observer = &log;
    options.routing_override = &to_one;
    options.ignore_padding = ignore_padding;
    model.model().Encode(ids, valid, options);
    return log.routings[0].dropped_BT.to(at::kLong);
  };
  EXPECT_TRUE(at::equal(dropped(false),
                        at::tensor({0, 0, 0, 0, 1, 1, 1}, at::kLong).unsqueeze(0)));
  EXPECT_TRUE(at::equal(dropped(true),
                        at::tensor({1, 1, 1, 0, 0, 0, 0}, at::kLong).unsqueeze(0)));
}

TEST(RelativeBuckets, BordersAreTheReferences) {
  const at::Tensor distance =
      at::tensor({0, 1, 7, 8, 11, 12, 63, 64, 127, 128, 9999}, at::kLong);
  EXPECT_TRUE(at::equal(RelativeBuckets(-distance, true, 32, 128),
                        at::tensor({0, 1, 7, 8, 8, 9, 13, 14, 15, 15, 15}, at::kLong)));
  EXPECT_TRUE(at::equal(RelativeBuckets(distance.narrow(0, 1, 3), true, 32, 128),
                        at::tensor({17, 23, 24}, at::kLong)));
  EXPECT_TRUE(at::equal(RelativeBuckets(-distance, false, 32, 128),
                        at::tensor({0, 1, 7, 8, 11, 12, 26, 26, 31, 31, 31}, at::kLong)));
  EXPECT_TRUE((RelativeBuckets(distance, false, 32, 128) == 0).all().item<bool>());
}

TEST(Batches, ASequenceIsRoutedAsItIsAlone) {
  SwitchConfig config = SmallConfig();
  config.expert_capacity = 2;
  ResidentModel model(RandomCheckpoint(config, 7));
  const Inputs in;
  const auto log_of = [&](const at::Tensor& ids, const at::Tensor& valid) {
    RoutingLog log;
    ForwardOptions options;
    options.observer = &log;
    model.model().Encode(ids, valid, options);
    return log.routings;
  };
  const auto together = log_of(in.ids, in.valid);
  for (int64_t b = 0; b < 3; ++b) {
    const int64_t length = in.valid[b].sum().item<int64_t>();
    const auto alone = log_of(in.ids.narrow(0, b, 1).narrow(1, 0, length),
                              at::ones({1, length}, at::kBool));
    for (size_t layer = 0; layer < alone.size(); ++layer) {
      const auto row = [&](const at::Tensor& whole) {
        return whole.narrow(0, b, 1).narrow(1, 0, length);
      };
      EXPECT_TRUE(
          at::equal(row(together[layer].expert_ids_BT), alone[layer].expert_ids_BT));
      EXPECT_TRUE(at::equal(row(together[layer].dropped_BT), alone[layer].dropped_BT));
      EXPECT_TRUE(at::allclose(row(together[layer].logits_BTE), alone[layer].logits_BTE,
                               1e-4, 1e-4));
    }
  }
}

}  // namespace
}  // namespace routecast
