// Decoding in fixed memory with experts that come and go: whatever has to come, and
// wherever it lies, the same bits; what is not leased is not read.
#include <c10/core/GradMode.h>

#include "common/errors.h"
#include "models/generation.h"
#include "models/static_decoder.h"
#include "tests/models/device_test.h"
#include "tests/models/leased_experts.h"

namespace routecast {
namespace {

constexpr int64_t kSource = 12, kSteps = 7;

// Always the expert behind the one that was chosen.
class NextExpert : public RoutingOverride {
 public:
  void Replace(int, at::Tensor* ids_BT, at::Tensor* gates_BT) override {
    *ids_BT = (*ids_BT + 1).remainder(8);
    *gates_BT = at::full_like(*gates_BT, 0.75);
  }
};

class LeasedDecoderTest : public DeviceTest {
 protected:
  void Make(const SwitchConfig& config, int64_t rows = 4,
            at::ScalarType type = at::kFloat) {
    Checkpoint c = RandomCheckpoint(config, 21);
    Parameters there;
    for (const auto& [name, tensor] : c.parameters.items())
      there.Add(name, On(tensor).to(type));
    config_ = c.config;
    parameters_ = there;
    experts_ = ExpertWeightsOf(config_, parameters_);
    resident_ = std::make_unique<ResidentExpertSource>(config_.geometry(), experts_);
    at::manual_seed(22);
    ids_ = at::randint(2, 96, {rows, kSource}, at::kLong);
    valid_ = at::arange(kSource).unsqueeze(0) < at::randint(5, kSource + 1, {rows, 1});
    tokens_ = at::randint(2, 96, {rows, kSteps}, at::kLong);
    live_ = at::ones({rows, kSteps}, at::kBool);
  }
  SwitchModel Model(ExpertSource* source) {
    executors_.push_back(
        std::make_unique<LocalExpertExecutor>(source, config_.activation));
    return SwitchModel(config_, parameters_, executors_.back().get());
  }
  MovingSource Moving(int slots, Events* events = nullptr) {
    return MovingSource(config_, experts_, slots, events);
  }
  at::Tensor Encoded() {
    const c10::NoGradGuard no_grad;
    return Model(resident_.get()).Encode(ids_, valid_);
  }
  // [R,T,V] of all steps, in a decoder of its own or in `decoder`.
  at::Tensor Steps(StaticDecoder* decoder) {
    std::vector<at::Tensor> logits;
    for (int64_t t = 0; t < kSteps; ++t) {
      logits.push_back(
          decoder->Step(tokens_.narrow(1, t, 1), live_.narrow(1, t, 1)).clone());
    }
    return at::stack(logits, 1).to(at::kCPU);
  }
  at::Tensor StepsFrom(ExpertSource* source, const ForwardOptions& options = {}) {
    SwitchModel model = Model(source);
    EXPECT_TRUE(StaticDecoder::Serves(model, options, ids_.size(0)));
    StaticDecoder decoder(&model, Encoded(), valid_, kSteps, options);
    const at::Tensor logits = Steps(&decoder);
    EXPECT_EQ(decoder.recorded(), device().is_cuda());
    return logits;
  }
  // The same by Decode with a cache that grows.
  at::Tensor Growing(ExpertSource* source, const ForwardOptions& options = {}) {
    const c10::NoGradGuard no_grad;
    const at::Tensor encoded = Encoded();
    SwitchModel model = Model(source);
    DecoderCache cache;
    std::vector<at::Tensor> logits;
    for (int64_t t = 0; t < kSteps; ++t) {
      const at::Tensor hidden =
          model.Decode(tokens_.narrow(1, t, 1), live_.narrow(1, t, 1), encoded, valid_,
                       &cache, options);
      logits.push_back(model.Logits(hidden.select(1, 0)));
    }
    return at::stack(logits, 1).to(at::kCPU);
  }
  void ExpectClose(const at::Tensor& a, const at::Tensor& b) {
    EXPECT_TRUE(at::allclose(a, b, 1e-4, 1e-4)) << (a - b).abs().max().item<double>();
  }

  SwitchConfig config_;
  Parameters parameters_;
  std::vector<ExpertWeights> experts_;
  std::unique_ptr<ResidentExpertSource> resident_;
  std::vector<std::unique_ptr<LocalExpertExecutor>> executors_;
  at::Tensor ids_, valid_, tokens_, live_;
};
ROUTECAST_INSTANTIATE_DEVICES(LeasedDecoderTest);

TEST_P(LeasedDecoderTest, EveryStepEqualsTheIncrementalDecoder) {
  for (const char* act : {"relu", "gelu_new"}) {
    for (int64_t rows : {1, 4}) {
      SwitchConfig config = SmallConfig();
      config.activation = *FindActivation(act);
      config.is_gated_act = config.activation != Activation::kRelu;
      Make(config, rows);
      MovingSource source = Moving(8);
      ExpectClose(StepsFrom(&source), Growing(resident_.get()));
    }
  }
}

// A slot is enough: the rows then run in turns.
TEST_P(LeasedDecoderTest, TheBitsAreThoseOfEverythingThereHoweverFewSlots) {
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
    for (int64_t rows : {1, 4}) {
      Make(SmallConfig(), rows, type);
      LeasedResident everything(resident_.get());
      const at::Tensor want = StepsFrom(&everything);
      for (int slots : {1, 2, 3, 8}) {
        MovingSource source = Moving(slots);
        EXPECT_TRUE(at::equal(StepsFrom(&source), want)) << rows << " rows, " << slots;
        EXPECT_LE(source.most_held, std::min<int64_t>(slots, rows));
        EXPECT_EQ(source.held, 0);
      }
      // The same kernels as where the device finds all experts by itself.
      EXPECT_TRUE(at::equal(StepsFrom(resident_.get()), want));
    }
  }
}

TEST_P(LeasedDecoderTest, LeasesOfALayerAreHeldTogetherWhereTheyMayBe) {
  Make(SmallConfig());
  MovingSource source = Moving(8);
  StepsFrom(&source);
  EXPECT_GT(source.most_held, 1);
}

TEST_P(LeasedDecoderTest, ObserversAndSourceHearWhatTheIncrementalDecoderTells) {
  Make(SmallConfig());
  Events want, got;
  EventLog eager(&want), parts(&got);
  ForwardOptions options;
  MovingSource few = Moving(2, &want), others = Moving(2, &got);
  options.observer = &eager;
  Growing(&few, options);
  options.observer = &parts;
  StepsFrom(&others, options);
  EXPECT_EQ(got, want);
  ASSERT_EQ(parts.routings.size(), eager.routings.size());
  for (size_t i = 0; i < eager.routings.size(); ++i) {
    const LayerRouting &a = parts.routings[i], &b = eager.routings[i];
    EXPECT_EQ(a.layer, b.layer);
    EXPECT_TRUE(at::equal(a.expert_ids_BT, b.expert_ids_BT));
    EXPECT_TRUE(at::equal(a.dropped_BT, b.dropped_BT));
    ExpectClose(a.input_BTD, b.input_BTD);
    ExpectClose(a.logits_BTE, b.logits_BTE);
    ExpectClose(a.gate_probs_BT, b.gate_probs_BT);
  }
  for (size_t i = 0; i < eager.passes.size(); ++i) {
    EXPECT_TRUE(at::equal(parts.passes[i].token_ids_BT, eager.passes[i].token_ids_BT));
    EXPECT_TRUE(at::equal(parts.passes[i].valid_BT, eager.passes[i].valid_BT));
    ExpectClose(parts.outputs[i], eager.outputs[i]);
  }
}

TEST_P(LeasedDecoderTest, ATableTravelsOnlyWhenAnExpertHasMoved) {
  Make(SmallConfig(), 1);
  LeasedResident everything(resident_.get());
  SwitchModel model = Model(&everything);
  StaticDecoder decoder(&model, Encoded(), valid_, kSteps, {});
  Steps(&decoder);
  const int64_t sent = decoder.tables_sent();
  EXPECT_GT(sent, 0);
  decoder.Begin(Encoded(), valid_, {});
  Steps(&decoder);
  EXPECT_EQ(decoder.tables_sent(), sent);
  // Always in another slot: each layer of each step, twice.
  MovingSource moving = Moving(3);
  SwitchModel other = Model(&moving);
  StaticDecoder moved(&other, Encoded(), valid_, kSteps, {});
  Steps(&moved);
  EXPECT_EQ(moved.tables_sent(), 2 * kSteps);
}

TEST_P(LeasedDecoderTest, WithoutCapacityNobodyIsAsked) {
  SwitchConfig config = SmallConfig();
  config.expert_capacity = 0;
  Make(config);
  Events events;
  MovingSource source = Moving(2, &events);
  ExpectClose(StepsFrom(&source), Growing(resident_.get()));
  EXPECT_TRUE(events.empty());
}

TEST_P(LeasedDecoderTest, RowsThatEndedNeedNoExpertWherePaddingIsIgnored) {
  Make(SmallConfig());
  live_[1].slice(0, 3).fill_(false);
  live_[2].slice(0, 3).fill_(false);
  ForwardOptions options;
  options.ignore_padding = true;
  Events want, got;
  MovingSource few = Moving(2, &want), others = Moving(2, &got);
  ExpectClose(StepsFrom(&others, options), Growing(&few, options));
  EXPECT_EQ(got, want);
  Events all;
  MovingSource counting = Moving(2, &all);
  StepsFrom(&counting);
  EXPECT_NE(all, got);
}

TEST_P(LeasedDecoderTest, AForcedChoiceIsRunAndShown) {
  for (bool ignore_padding : {false, true}) {
    Make(SmallConfig());
    live_[1].slice(0, 3).fill_(false);
    NextExpert forced;
    Events want, got;
    EventLog eager(&want), parts(&got);
    MovingSource few = Moving(2, &want), others = Moving(2, &got);
    ForwardOptions options;
    options.ignore_padding = ignore_padding;
    options.routing_override = &forced;
    options.observer = &parts;
    const at::Tensor logits = StepsFrom(&others, options);
    options.observer = &eager;
    ExpectClose(logits, Growing(&few, options));
    EXPECT_EQ(got, want);
    for (size_t i = 0; i < eager.routings.size(); ++i) {
      const LayerRouting &a = parts.routings[i], &b = eager.routings[i];
      EXPECT_TRUE(at::equal(a.expert_ids_BT, b.expert_ids_BT));
      EXPECT_TRUE(at::equal(a.gate_probs_BT, b.gate_probs_BT));
      EXPECT_TRUE(at::equal(a.dropped_BT, b.dropped_BT));
    }
  }
}

TEST_P(LeasedDecoderTest, AStepThatFailsLeavesADecoderThatSaysSoUntilItBeginsAnew) {
  Make(SmallConfig());
  LeasedResident everything(resident_.get());
  const at::Tensor want = StepsFrom(&everything);
  const at::Tensor encoded = Encoded();
  MovingSource source = Moving(8);
  SwitchModel model = Model(&source);
  StaticDecoder decoder(&model, encoded, valid_, kSteps, {});
  const auto step = [&](int64_t t) {
    decoder.Step(tokens_.narrow(1, t, 1), live_.narrow(1, t, 1));
  };
  // In the first layer of the first step, later, and in the step that is recorded.
  for (int after : {1, 2, 12, 20}) {
    source.asked = 0;
    source.fails_at = after;
    int64_t t = 0;
    EXPECT_THROW(while (true) step(t++), EnvironmentError);
    EXPECT_EQ(source.held, 0);
    EXPECT_THROW(step(0), std::logic_error);
    source.fails_at = -1;
    decoder.Begin(encoded, valid_, {});
    EXPECT_TRUE(at::equal(Steps(&decoder), want)) << after;
    decoder.Begin(encoded, valid_, {});
  }
}

TEST_P(LeasedDecoderTest, OneMemoryServesTextsOfSeveralLengths) {
  Make(SmallConfig());
  LeasedResident everything(resident_.get());
  SwitchModel model = Model(&everything);
  const int64_t rows = ids_.size(0);
  StaticDecoder kept(&model, rows, kSource + 5, kSteps, {});
  const auto begin = [&](StaticDecoder* decoder, int64_t length) {
    const c10::NoGradGuard no_grad;
    ids_ = ids_.narrow(1, 0, length);
    valid_ = valid_.narrow(1, 0, length);
    decoder->Begin(Encoded(), valid_, {});
  };
  EXPECT_THROW(Steps(&kept), std::logic_error) << "nothing was begun";
  for (int64_t length : {kSource, int64_t{7}}) {
    begin(&kept, length);
    const at::Tensor got = Steps(&kept);
    ExpectClose(got, Growing(resident_.get()));
    StaticDecoder fresh(&model, rows, kSource + 5, kSteps, {});
    begin(&fresh, length);
    EXPECT_TRUE(at::equal(got, Steps(&fresh)));
  }
  const c10::NoGradGuard no_grad;
  const at::Tensor encoded = Encoded();
  ForwardOptions ignoring;
  ignoring.ignore_padding = true;
  EXPECT_THROW(kept.Begin(encoded, valid_, ignoring), std::logic_error);
  EXPECT_THROW(kept.Begin(encoded.narrow(0, 0, 1), valid_.narrow(0, 0, 1), {}),
               std::logic_error);
  const at::Tensor longer = encoded.repeat({1, 4, 1});
  EXPECT_THROW(kept.Begin(longer, valid_.repeat({1, 4}), {}), std::logic_error);
}

TEST_P(LeasedDecoderTest, GenerationInKeptMemoryChoosesTheSameTokens) {
  Make(SmallConfig(), 2);
  for (int beams : {1, 3}) {
    GenerationOptions options;
    options.max_new_tokens = 9;
    options.beams.num_beams = beams;
    SwitchModel plain = Model(resident_.get());
    MovingSource source = Moving(3);
    SwitchModel model = Model(&source);
    StaticDecoder kept(&model, 2 * beams, kSource, options.max_new_tokens, {});
    const auto want = Generate(&plain, ids_, valid_, options);
    options.steps_in = &kept;
    for (int again = 0; again < 2; ++again) {
      const auto got = Generate(&model, ids_, valid_, options);
      ASSERT_EQ(got.size(), want.size());
      for (size_t i = 0; i < got.size(); ++i) EXPECT_EQ(got[i].ids, want[i].ids) << beams;
    }
  }
}

TEST_P(LeasedDecoderTest, ItsMemoryIsCounted) {
  Make(SmallConfig());
  LeasedResident everything(resident_.get());
  SwitchModel model = Model(&everything);
  const auto bytes = [&](int64_t rows, int64_t source, int64_t steps) {
    return StaticDecoder(&model, rows, source, steps, {}).memory_bytes();
  };
  const SwitchConfig& c = config_;
  const uint64_t place = uint64_t(c.num_decoder_layers) * 2 * c.num_heads * c.d_kv * 4;
  const uint64_t small = bytes(1, 10, 5);
  EXPECT_GE(small, 15 * place);
  EXPECT_GE(bytes(1, 10, 9), small + 4 * place);
  EXPECT_GE(bytes(1, 20, 5), small + 10 * place);
  EXPECT_GE(bytes(3, 10, 5), small + 2 * 15 * place);
  EXPECT_LT(small, 2 * 15 * place);
  if (!device().is_cuda()) return;
  StaticDecoder decoder(&model, Encoded(), valid_, kSteps, {});
  const uint64_t before = decoder.memory_bytes();
  Steps(&decoder);
  EXPECT_GT(decoder.memory_bytes(), before) << "what the recording keeps";
}

}  // namespace
}  // namespace routecast
