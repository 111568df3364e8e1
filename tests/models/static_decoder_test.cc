// Decoding in fixed memory against incremental decoding, step by step; on a GPU as a
// recorded graph.
#include "models/static_decoder.h"

#include <c10/core/GradMode.h>

#include "models/generation.h"
#include "tests/models/device_test.h"
#include "tests/models/switch_test_support.h"

namespace routecast {
namespace {

constexpr int64_t kRows = 3, kSteps = 9;

// Keeps what a step ends with, too.
class StepLog : public RoutingLog {
 public:
  void OnPassEnd(const PassInfo& pass) override {
    outputs.push_back(pass.output_BTD.clone());
  }
  std::vector<at::Tensor> outputs;
};

class StaticDecoderTest : public DeviceTest {
 protected:
  std::unique_ptr<ResidentModel> Model(const SwitchConfig& config) {
    Checkpoint c = RandomCheckpoint(config, 11);
    Parameters there;
    for (const auto& [name, tensor] : c.parameters.items()) there.Add(name, On(tensor));
    c.parameters = there;
    return std::make_unique<ResidentModel>(std::move(c));
  }
  // The same tokens through both; every step's logits must agree.
  void Compare(SwitchModel* model, ForwardOptions options, const at::Tensor& live_RT,
               RoutingLog* eager_log = nullptr, RoutingLog* static_log = nullptr) {
    const c10::NoGradGuard no_grad;
    const at::Tensor encoded = model->Encode(ids_, valid_);
    options.observer = static_log;
    ASSERT_TRUE(StaticDecoder::Serves(*model, options, kRows));
    StaticDecoder decoder(model, encoded, valid_, kSteps, options);
    options.observer = eager_log;
    DecoderCache cache;
    for (int64_t t = 0; t < kSteps; ++t) {
      const at::Tensor token = tokens_.narrow(1, t, 1), live = live_RT.narrow(1, t, 1);
      const at::Tensor want =
          model->Logits(model->Decode(token, live, encoded, valid_, &cache, options));
      EXPECT_TRUE(at::allclose(decoder.Step(token, live), want.select(1, 0), 1e-4, 1e-4))
          << "step " << t;
    }
    EXPECT_EQ(decoder.recorded(), device().is_cuda());
    EXPECT_THROW(decoder.Step(tokens_.narrow(1, 0, 1), live_RT.narrow(1, 0, 1)),
                 std::logic_error);
  }
  at::Tensor all_live_ = at::ones({kRows, kSteps}, at::kBool);

 private:
  at::Tensor ids_ = at::randint(2, 96, {kRows, 12}, at::kLong);
  at::Tensor valid_ = at::arange(12).unsqueeze(0) < at::tensor({12, 9, 5}).unsqueeze(1);
  at::Tensor tokens_ = at::randint(2, 96, {kRows, kSteps}, at::kLong);
};
ROUTECAST_INSTANTIATE_DEVICES(StaticDecoderTest);

TEST_P(StaticDecoderTest, EveryStepEqualsTheIncrementalDecoder) {
  for (const char* act : {"relu", "gelu_new"}) {
    SwitchConfig config = SmallConfig();
    config.activation = *FindActivation(act);
    config.is_gated_act = config.activation != Activation::kRelu;
    config.relative_attention_num_buckets = 6;  // distances share buckets within 9 steps
    config.relative_attention_max_distance = 8;
    Compare(&Model(config)->model(), {}, all_live_);
  }
}

TEST_P(StaticDecoderTest, WithoutCapacityTheResidualAloneIsLeft) {
  SwitchConfig config = SmallConfig();
  config.expert_capacity = 0;
  Compare(&Model(config)->model(), {}, all_live_);
}

TEST_P(StaticDecoderTest, RowsThatEndedGoToNoExpertWherePaddingIsIgnored) {
  ForwardOptions options;
  options.ignore_padding = true;
  at::Tensor live = all_live_.clone();
  live[1].narrow(0, 4, 5).fill_(false);
  Compare(&Model(SmallConfig())->model(), options, live);
}

TEST_P(StaticDecoderTest, ObserversHearOfEveryStepAndLayer) {
  StepLog eager, fixed;
  Compare(&Model(SmallConfig())->model(), {}, all_live_, &eager, &fixed);
  ASSERT_EQ(fixed.routings.size(), eager.routings.size());
  ASSERT_EQ(fixed.passes.size(), eager.passes.size());
  for (size_t i = 0; i < eager.passes.size(); ++i) {
    EXPECT_EQ(fixed.passes[i].first_position, eager.passes[i].first_position);
    EXPECT_TRUE(at::equal(fixed.passes[i].token_ids_BT, eager.passes[i].token_ids_BT));
  }
  ASSERT_EQ(fixed.outputs.size(), eager.outputs.size());
  for (size_t i = 0; i < eager.outputs.size(); ++i) {
    EXPECT_TRUE(at::allclose(fixed.outputs[i], eager.outputs[i], 1e-4, 1e-4));
  }
  // On a GPU a replay writes into the same memory: only the last step's is still there.
  const size_t first = device().is_cuda() ? eager.routings.size() - 2 : 0;
  for (size_t i = first; i < eager.routings.size(); ++i) {
    EXPECT_EQ(fixed.routings[i].layer, eager.routings[i].layer);
    EXPECT_TRUE(
        at::equal(fixed.routings[i].expert_ids_BT, eager.routings[i].expert_ids_BT));
    EXPECT_TRUE(at::allclose(fixed.routings[i].margins_BT, eager.routings[i].margins_BT,
                             1e-3, 1e-3));
  }
}

TEST_P(StaticDecoderTest, ReorderedRowsGoOnFromTheRowsTheyWere) {
  const c10::NoGradGuard no_grad;
  const auto resident = Model(SmallConfig());
  SwitchModel& model = resident->model();
  const at::Tensor ids = at::randint(2, 96, {1, 7}, at::kLong);
  const at::Tensor valid = at::ones({3, 7}, at::kBool),
                   live = at::ones({3, 1}, at::kBool);
  const at::Tensor encoded =
      model.Encode(ids, valid.narrow(0, 0, 1)).expand({3, -1, -1}).contiguous();
  StaticDecoder decoder(&model, encoded, valid, 4, {}),
      sorted(&model, encoded, valid, 4, {});
  const at::Tensor first = at::tensor({5, 6, 7}, at::kLong).unsqueeze(1);
  const at::Tensor source = at::tensor({2, 0, 2}, at::kLong);
  decoder.Step(first, live);
  decoder.Reorder(On(source));
  sorted.Step(first.index_select(0, source), live);
  const at::Tensor next = at::tensor({8, 9, 10}, at::kLong).unsqueeze(1);
  EXPECT_TRUE(
      at::allclose(decoder.Step(next, live), sorted.Step(next, live), 1e-5, 1e-5));
}

TEST_P(StaticDecoderTest, DoesNotServeWhereSomethingHappensBetweenLayers) {
  class Nothing : public RoutingOverride {
    void Replace(int, at::Tensor*, at::Tensor*) override {}
  } override_nothing;
  class Watcher : public RoutingObserver {
    void OnPassBegin(const PassInfo&) override {}
    void OnRouting(const LayerRouting&) override {}
    void OnPassEnd(const PassInfo&) override {}
    bool WantsAttention() const override { return true; }
  } watcher;
  const auto resident = Model(SmallConfig());
  ForwardOptions forced, noisy, watched;
  watched.observer = &watcher;
  forced.routing_override = &override_nothing;
  noisy.jitter = 0.1;
  EXPECT_TRUE(StaticDecoder::Serves(resident->model(), {}, 1));
  EXPECT_FALSE(StaticDecoder::Serves(resident->model(), forced, 1));
  EXPECT_FALSE(StaticDecoder::Serves(resident->model(), noisy, 1));
  EXPECT_FALSE(StaticDecoder::Serves(resident->model(), watched, 1));
  EXPECT_FALSE(StaticDecoder::Serves(resident->model(), {}, 1000));
}

TEST_P(StaticDecoderTest, DoesNotServeAnExecutorWithoutTables) {
  class NoTables : public ExpertExecutor {
    at::Tensor Run(int, const at::Tensor& tokens, const at::Tensor&) override {
      return tokens;
    }
  } executor;
  const Checkpoint c = RandomCheckpoint(SmallConfig(), 12);
  const SwitchModel model(c.config, c.parameters, &executor);
  EXPECT_FALSE(StaticDecoder::Serves(model, {}, 1));
}

// The whole of generation: on a GPU it takes the graph, on a CPU the incremental decoder.
TEST_P(StaticDecoderTest, GenerationChoosesTheSameTokensOnEveryDevice) {
  SwitchConfig config = SmallConfig();
  config.eos_token_id = 1;
  const auto here = Model(config);
  ResidentModel host(RandomCheckpoint(config, 11));
  at::manual_seed(13);
  const at::Tensor ids = at::randint(2, 96, {2, 10}, at::kLong);
  const at::Tensor valid = at::ones({2, 10}, at::kBool);
  GenerationOptions options;
  options.max_new_tokens = 12;
  options.record_steps = true;
  for (int beams : {1, 3}) {
    options.beams.num_beams = beams;
    const auto got = Generate(&here->model(), ids, valid, options);
    const auto want = Generate(&host.model(), ids, valid, options);
    ASSERT_EQ(got.size(), want.size());
    for (size_t i = 0; i < got.size(); ++i) EXPECT_EQ(got[i].ids, want[i].ids) << beams;
  }
}

TEST_P(StaticDecoderTest, ACallbackGetsLogitsOnTheCpuUnlessItNeedsNone) {
  const auto resident = Model(SmallConfig());
  const at::Tensor ids = at::randint(2, 96, {1, 6}, at::kLong);
  GenerationOptions options;
  options.max_new_tokens = 3;
  for (bool wanted : {true, false}) {
    int calls = 0;
    options.logits_on_step = wanted;
    options.on_step = [&](int, const at::Tensor& logits, const at::Tensor& chosen) {
      ++calls;
      EXPECT_EQ(logits.defined() && logits.is_cpu(), wanted);
      return chosen.is_cpu();
    };
    Generate(&resident->model(), ids, at::ones({1, 6}, at::kBool), options);
    EXPECT_GE(calls, 1);
  }
}

}  // namespace
}  // namespace routecast
