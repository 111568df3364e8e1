// Published sizes of every kind, and members of one shape in one model: equal to models
// of their own.
#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "common/errors.h"
#include "models/baseline_predictors.h"
#include "models/checkpoint.h"
#include "models/dropout_mask.h"
#include "models/ensemble_model.h"
#include "models/trunk_model.h"
#include "speculation_test_support.h"

namespace routecast {
namespace {

// What was published, without our additions, for one target layer.
int64_t PublishedParameters(const std::string& kind, int width_of_state, int experts,
                            int width = 0, int heads = 0, int layers = 0) {
  MoeGeometry g{1, 0, experts, 1, width_of_state};
  SpeculationConfig c = DefaultSpeculationConfig(kind, g, 0, width_of_state);
  if (width > 0) {
    c.width = width;
    c.heads = heads;
    c.ff = 4 * width;
    c.layers = layers;
  }
  c.priors = false;
  const auto model = MakeSpeculationModel(c, 1);
  int64_t count = 0;
  for (const auto& [name, tensor] : model->parameters().items()) {
    if (name.rfind("ours.", 0) != 0) count += tensor.numel();
  }
  return count;
}

// Ours in `interlayer`: rows for padding, stacks, sources and leads.
int64_t InterlayerParameters(const std::string& kind, int width, int heads, int layers) {
  return PublishedParameters(kind, 768, 128, width, heads, layers) -
         int64_t{width} * (1 + 2 + 2 + 1);
}

TEST(SpeculationKindsTest, InterlayerSizesAreThePublished) {
  EXPECT_EQ(InterlayerParameters("interlayer", 256, 8, 4), 4624769);
  EXPECT_EQ(InterlayerParameters("interlayer", 512, 16, 6), 24532609);
  EXPECT_EQ(InterlayerParameters("interlayer", 320, 10, 5), 8416769);
  EXPECT_EQ(InterlayerParameters("interlayer", 384, 12, 5), 12078465);
  EXPECT_EQ(InterlayerParameters("interlayer", 384, 12, 4), 10304001);
}

TEST(SpeculationKindsTest, MixtureSizesAreThePublished) {
  EXPECT_EQ(InterlayerParameters("moe", 256, 8, 4), 11986817);
}

// The decoder alone: four layers of attention over leads and context, and the inner ones.
TEST(SpeculationKindsTest, TheDecoderOverLeadsHasThePlannedSize) {
  SpeculationConfig c =
      DefaultSpeculationConfig("autoregressive", MoeGeometry{6, 6, 128, 1, 768}, 0, 0);
  const auto model = MakeSpeculationModel(c, 1);
  int64_t count = 0;
  for (const auto& [name, tensor] : model->parameters().items()) {
    if (name.rfind("decoder.", 0) == 0) count += tensor.numel();
  }
  EXPECT_EQ(count, 4213760);
}

TEST(SpeculationKindsTest, MultiscaleSizesAreThePublished) {
  EXPECT_EQ(PublishedParameters("multiscale", 768, 128), 24799044);
}

TEST(SpeculationKindsTest, LegacySizesAreThePublished) {
  EXPECT_EQ(PublishedParameters("simple", 512, 128), 196992);
  EXPECT_EQ(PublishedParameters("lstm", 512, 128), 362880);
  EXPECT_EQ(PublishedParameters("attention", 512, 128), 164736);
  EXPECT_EQ(PublishedParameters("conv1d", 512, 128), 120752);
  EXPECT_EQ(PublishedParameters("legacy_multiscale", 512, 128), 311936);
}

TEST(SpeculationKindsTest, GatingSizesAreThePublished) {
  EXPECT_EQ(PublishedParameters("contextual", 512, 8), 2567689);
  EXPECT_EQ(PublishedParameters("contextual", 512, 128), 2659969);
  EXPECT_EQ(PublishedParameters("contextual", 768, 128), 5710209);
  EXPECT_EQ(PublishedParameters("hierarchical", 512, 128), 2824195);
  // Published with an embedding of six layers, which are ours here (source layers).
  EXPECT_EQ(PublishedParameters("transformer", 512, 128), 10315905 - 6 * 512);
}

class StackedKindTest : public testing::TestWithParam<std::string> {};
std::vector<std::string> Stackable() {
  auto kinds = SpeculationNames();
  std::erase(kinds, "ensemble");
  return kinds;
}
INSTANTIATE_TEST_SUITE_P(Kinds, StackedKindTest, testing::ValuesIn(Stackable()),
                         [](const auto& info) { return info.param; });

RoutingWindow SomeWindow(Stack stack, int source) {
  const MoeGeometry g = SmallGeometry();
  return BatchOf({RandomTrace(g, 6, 5, 1), RandomTrace(g, 4, 3, 2)}, stack, source, 5);
}

void FillConstants(SpeculationModel* model) {
  const c10::NoGradGuard no_grad;
  at::manual_seed(5);
  for (const auto& [name, tensor] : model->constants().items()) tensor.normal_();
}

// Outputs and gradients, with dropout, in both stacks.
TEST_P(StackedKindTest, MembersEqualModelsOfTheirOwn) {
  const SpeculationConfig config = SmallSpeculation(GetParam());
  const std::vector<uint64_t> seeds = {7, 8, 9};
  const auto all = KindOf(config.kind).make(config, seeds);
  FillConstants(all.get());
  std::vector<std::unique_ptr<SpeculationModel>> alone;
  for (const uint64_t seed : seeds) {
    alone.push_back(MakeSpeculationModel(config, seed));
    FillConstants(alone.back().get());
  }
  const std::pair<Stack, int> windows[] = {{Stack::kEncoder, -1},
                                           {Stack::kEncoder, 1},
                                           {Stack::kDecoder, -1},
                                           {Stack::kDecoder, 2}};
  uint64_t key = 100;
  for (const auto& [stack, source] : windows) {
    const RoutingWindow window = SomeWindow(stack, source);
    ++key;
    const auto together = all->Forward(window, key);
    together.logits_BTHE.square().sum().backward();
    const int64_t B = window.token_ids_BT.size(0);
    for (int64_t m = 0; m < 3; ++m) {
      const auto own = alone[size_t(m)]->Forward(window, MemberKey(key, m));
      own.logits_BTHE.square().sum().backward();
      const auto part = together.logits_BTHE.narrow(0, m * B, B);
      EXPECT_TRUE(at::allclose(part, own.logits_BTHE, 1e-4, 1e-5))
          << StackName(stack) << source << " member " << m << " "
          << (part - own.logits_BTHE).abs().max().item<float>();
      EXPECT_TRUE(at::allclose(together.confidence_BTH.narrow(0, m * B, B),
                               own.confidence_BTH, 1e-4, 1e-5));
    }
  }
  for (const auto& [name, tensor] : all->parameters().items()) {
    if (!tensor.grad().defined()) continue;
    for (int64_t m = 0; m < 3; ++m) {
      const auto& own = alone[size_t(m)]->parameters().Get(name);
      EXPECT_TRUE(at::equal(tensor[m], own)) << name;
      EXPECT_TRUE(at::allclose(tensor.grad()[m], own.grad(), 1e-3, 1e-4)) << name;
    }
  }
}

// A row's `uses` are what its model does: a size that it has a use for changes the
// parameters or the answer, any other changes neither.
TEST(SpeculationKindsTest, AKindUsesTheSizesThatItsRowSays) {
  const c10::NoGradGuard no_grad;
  const std::pair<unsigned, void (*)(SpeculationConfig*)> changes[] = {
      {kUsesWidth, [](SpeculationConfig* c) { c->width *= 2; }},
      {kUsesHeads, [](SpeculationConfig* c) { c->heads /= 2; }},
      {kUsesFf, [](SpeculationConfig* c) { c->ff *= 2; }},
      {kUsesLayers, [](SpeculationConfig* c) { ++c->layers; }},
      {kUsesContext, [](SpeculationConfig* c) { ++c->context; }},
      {kUsesDropout, [](SpeculationConfig* c) { c->dropout = 0.5; }}};
  const std::vector<RoutingTrace> traces = {RandomTrace(SmallGeometry(), 6, 5, 2)};
  const auto window = BatchOf(traces, Stack::kDecoder, 1, 5);
  at::manual_seed(3);
  std::vector<RouterWeights> routers;
  for (int l = 0; l < SmallGeometry().num_layers(); ++l) {
    routers.push_back({at::randn({5, 6}), at::randn({5}), at::rand({6}) + 0.5});
  }
  // Some of what a new model has is zero, and hides what it is multiplied by.
  const auto make = [&](const SpeculationConfig& c) {
    auto model = MakeSpeculationModel(c, 1);
    for (const auto& [name, tensor] : model->parameters().items()) {
      tensor.add_(0.02 * at::arange(tensor.numel()).remainder(7).view(tensor.sizes()));
    }
    if (KindOf(c.kind).routers) model->FitRouters(routers);
    return model;
  };
  const auto answer = [&](SpeculationModel* model) {
    return model->Forward(window, /*dropout_key=*/7).logits_BTHE;
  };
  for (const std::string& kind : SpeculationKinds()) {
    const SpeculationConfig config = SmallSpeculation(kind);
    const auto usual = make(config);
    EXPECT_EQ((KindOf(kind).uses & kLearnsConfidence) != 0, [&] {
      const c10::AutoGradMode grad(true);
      for (const auto& [name, tensor] : usual->parameters().items()) {
        tensor.requires_grad_(true);
      }
      return usual->Forward(window, 7).confidence_BTH.requires_grad();
    }()) << kind;
    for (const auto& [use, change] : changes) {
      SpeculationConfig other = config;
      change(&other);
      const auto changed = make(other);
      const bool differs =
          changed->parameters().num_elements() != usual->parameters().num_elements() ||
          !at::equal(answer(changed.get()), answer(usual.get()));
      EXPECT_EQ(differs, (KindOf(kind).uses & use) != 0) << kind << ", use " << use;
    }
    // Layers before the newest one.
    auto hidden = window;
    hidden.experts_BTL = window.experts_BTL.clone();
    hidden.experts_BTL.select(2, 0).fill_(5);
    const bool reads = !at::equal(usual->Forward(hidden, 0).logits_BTHE,
                                  usual->Forward(window, 0).logits_BTHE);
    EXPECT_EQ(reads, (KindOf(kind).uses & kUsesOlderLayers) != 0) << kind;
  }
}

// Every row of attention has a key: full, padded and single-token batches are finite.
TEST(DropoutMaskTest, IsAFunctionOfItsKeyAndKeepsTheMean) {
  std::vector<float> mask(100003), again(77);
  FillDropoutMask(5, 0.3, 100003, mask.data());
  FillDropoutMask(5, 0.3, 77, again.data());
  EXPECT_TRUE(std::equal(again.begin(), again.end(), mask.begin()));
  const double zeros = static_cast<double>(std::count(mask.begin(), mask.end(), 0.f));
  EXPECT_NEAR(zeros / 100003, 0.3, 0.006);  // four standard deviations
  EXPECT_NEAR(std::accumulate(mask.begin(), mask.end(), 0.0) / 100003, 1, 0.009);
  FillDropoutMask(6, 0.3, 77, again.data());
  EXPECT_FALSE(std::equal(again.begin(), again.end(), mask.begin()));
}

// No lane of a number leans, and neighbours know nothing of each other.
TEST(DropoutMaskTest, NeighboursAreIndependent) {
  std::vector<float> mask(200000);
  FillDropoutMask(9, 0.5, 200000, mask.data());
  for (const size_t distance : {1, 2, 3, 4, 64}) {
    int both = 0, pairs = 0;
    for (size_t i = 0; i + distance < mask.size(); ++i, ++pairs) {
      both += mask[i] != 0 && mask[i + distance] != 0;
    }
    EXPECT_NEAR(double(both) / pairs, 0.25, 0.005) << distance;
  }
}

TEST(SpeculationKindsTest, MultiscaleIsFiniteOnEveryBatch) {
  const auto model = MakeSpeculationModel(SmallSpeculation("multiscale"), 3);
  const MoeGeometry g = SmallGeometry();
  for (const Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
    for (int source = -1; source < g.layers(stack) - 1; ++source) {
      for (const auto& window :
           {WindowOf(RandomTrace(g, 6, 6, 1), stack, source, 5),
            BatchOf({RandomTrace(g, 9, 9, 1), RandomTrace(g, 1, 1, 2)}, stack, source, 5),
            WindowOf(RandomTrace(g, 1, 1, 3), stack, source, 5)}) {
        const auto out = model->Forward(window, 4);
        EXPECT_TRUE(at::isfinite(out.logits_BTHE).all().item<bool>());
        (out.logits_BTHE.square().sum() + out.confidence_BTH.sum()).backward();
      }
    }
  }
  for (const auto& [name, tensor] : model->parameters().items()) {
    EXPECT_TRUE(at::isfinite(tensor.grad()).all().item<bool>()) << name;
  }
}

// The original's defect: a mask that says "valid" taken for one that says "ignore" leaves
// no key at all, and softmax over nothing is no number. With finite masks it is the mean.
TEST(SpeculationKindsTest, AMaskWithoutKeysIsFiniteWhereInfinityIsNot) {
  const auto none = at::zeros({1, 1, 1, 4}, at::kBool);
  const auto scores = at::randn({1, 1, 3, 4});
  const auto inverted =
      at::zeros({1, 1, 1, 4})
          .masked_fill(none.logical_not(), -std::numeric_limits<double>::infinity());
  EXPECT_TRUE(at::isnan(at::softmax(scores + inverted, -1)).all().item<bool>());
  EXPECT_TRUE(
      at::isfinite(at::softmax(scores + AdditiveMask(none), -1)).all().item<bool>());
}

TEST(EnsembleModelTest, MixesItsMembersByWeight) {
  const c10::NoGradGuard no_grad;
  SpeculationConfig config = SmallSpeculation("ensemble");
  const RoutingWindow window = SomeWindow(Stack::kDecoder, 1);
  for (const std::string combine : {"probabilities", "logits", "vote"}) {
    config.combine = combine;
    const auto model = MakeSpeculationModel(config, 7);
    FillConstants(model.get());
    SetMemberWeights(model.get(), {3, 2, 5});
    const auto members = model->ForwardMembers(window, 0);
    at::Tensor expected;
    for (size_t m = 0; m < 3; ++m) {
      const auto& logits = members[m].logits_BTHE;
      const auto say = combine == "logits" ? logits
                       : combine == "vote"
                           ? at::one_hot(logits.argmax(-1), 5).to(at::kFloat)
                           : at::softmax(logits, -1);
      const auto part = say * std::vector<double>{.3, .2, .5}[m];
      expected = m == 0 ? part : expected + part;
    }
    const auto got = model->Forward(window, 0).logits_BTHE;
    EXPECT_TRUE(at::allclose(combine == "logits" ? got : got.exp(), expected, 1e-4, 2e-6))
        << combine;
  }
}

// Two members of one shape are one model with a leading dimension; the third its own.
TEST(EnsembleModelTest, MembersOfOneShapeShareTheirProducts) {
  const auto model = MakeSpeculationModel(SmallSpeculation("ensemble"), 7);
  EXPECT_EQ(model->parameters().Get("group.0.head.out.weight").dim(), 3);
  EXPECT_EQ(model->parameters().Get("group.1.head.out.weight").dim(), 2);
  // Every parameter belongs to one member, and only to one.
  int64_t elements = 0;
  for (const auto& member : model->MemberParameters()) {
    for (const ParameterSlice& slice : member) elements += slice.Value().numel();
  }
  EXPECT_EQ(elements, model->parameters().num_elements());
}

// Told what it would have said itself, it says the same.
TEST(AutoregressiveTest, TeachingWithItsOwnAnswersChangesNothing) {
  SpeculationConfig config = SmallSpeculation("autoregressive");
  config.dropout = 0;
  const auto model = MakeSpeculationModel(config, 7);
  RoutingWindow window = SomeWindow(Stack::kDecoder, 1);
  const auto greedy = model->Forward(window, 0).logits_BTHE.detach();
  window.training.teacher_BTH = greedy.argmax(-1);
  const auto taught = model->Forward(window, 5).logits_BTHE.detach();
  EXPECT_TRUE(at::allclose(taught, greedy, 1e-4, 1e-5));
}

TEST(AutoregressiveTest, ALeadFollowsTheLeadsBeforeIt) {
  SpeculationConfig config = SmallSpeculation("autoregressive");
  config.dropout = 0;
  const auto model = MakeSpeculationModel(config, 7);
  RoutingWindow window = SomeWindow(Stack::kEncoder, 0);  // three leads
  const auto truth = at::zeros({2, 6, 3}, at::kLong);
  window.training.teacher_BTH = truth;
  const auto before = model->Forward(window, 5).logits_BTHE.detach();
  window.training.teacher_BTH = truth.clone();
  window.training.teacher_BTH.select(2, 1).fill_(3);
  const auto after = model->Forward(window, 5).logits_BTHE.detach();
  EXPECT_TRUE(at::equal(before.narrow(2, 0, 2), after.narrow(2, 0, 2)));
  EXPECT_FALSE(at::allclose(before.select(2, 2), after.select(2, 2)));
}

// With a beam for every beginning of the leads, each lead's answer is its marginal of the
// joint probability, here summed over all of them.
TEST(AutoregressiveTest, BeamsMixTheJointProbability) {
  const c10::NoGradGuard no_grad;
  SpeculationConfig config = SmallSpeculation("autoregressive");
  config.dropout = 0;
  config.beams = 25;
  const auto model = MakeSpeculationModel(config, 7);
  RoutingWindow window = SomeWindow(Stack::kEncoder, 0);  // three leads, five experts
  const auto mixed = at::softmax(model->Forward(window, 0).logits_BTHE, -1);
  at::Tensor second, third;
  for (int64_t a = 0; a < 5; ++a) {
    for (int64_t b = 0; b < 5; ++b) {
      window.training.teacher_BTH =
          at::tensor({a, b, int64_t{0}}).expand({2, 6, 3}).contiguous();
      const auto p = at::softmax(model->Forward(window, 5).logits_BTHE, -1);
      const auto of_a = p.select(2, 0).select(2, a).unsqueeze(2);
      const auto of_b = of_a * p.select(2, 1).select(2, b).unsqueeze(2);
      if (b == 0)
        second =
            (a == 0 ? at::zeros_like(p.select(2, 1)) : second) + of_a * p.select(2, 1);
      third =
          (a + b == 0 ? at::zeros_like(p.select(2, 2)) : third) + of_b * p.select(2, 2);
    }
  }
  EXPECT_TRUE(at::allclose(mixed.select(2, 1), second, 1e-4, 1e-5));
  EXPECT_TRUE(at::allclose(mixed.select(2, 2), third, 1e-4, 1e-5));
  config.beams = 2;  // equal weights: less of the third lead's mass is seen
  const auto fewer = MakeSpeculationModel(config, 7);
  window.training = {};
  const auto two = at::softmax(fewer->Forward(window, 0).logits_BTHE, -1);
  EXPECT_TRUE(at::allclose(two.select(2, 0), mixed.select(2, 0), 1e-4, 1e-5));
  EXPECT_FALSE(at::allclose(two.select(2, 2), mixed.select(2, 2), 1e-4, 1e-5));
  EXPECT_EQ(SpeculationConfig::FromJson(config.ToJson(), "x"), config);
  config.kind = "interlayer";
  EXPECT_THROW(SpeculationConfig::FromJson(config.ToJson(), "x"), DataError);
}

// With queries of zero every pattern weighs the same.
TEST(PatternMemoryTest, TheEntropyOfEvenWeightsIsLn64) {
  for (const std::string kind : {"interlayer", "moe"}) {
    const auto model = MakeSpeculationModel(SmallSpeculation(kind), 7);
    RoutingWindow window = SomeWindow(Stack::kDecoder, 1);
    EXPECT_FALSE(model->Forward(window, 5).pattern_entropy_BT.defined()) << kind;
    window.training.pattern_entropy = true;
    EXPECT_FALSE(model->Forward(window, 0).pattern_entropy_BT.defined()) << "served";
    const auto some = model->Forward(window, 5).pattern_entropy_BT;
    EXPECT_TRUE(some.lt(std::log(64.)).all().item<bool>());
    some.sum().backward();
    EXPECT_GT(model->parameters().Get("pattern.memory").grad().abs().sum().item<float>(),
              0);
    const c10::NoGradGuard no_grad;
    for (const char* name : {"pattern.q.weight", "pattern.q.bias"}) {
      model->parameters().Get(name).zero_();
    }
    const auto even = model->Forward(window, 5).pattern_entropy_BT;
    EXPECT_EQ(even.sizes(), window.token_ids_BT.sizes());
    EXPECT_TRUE(at::allclose(even, at::full_like(even, std::log(64.))));
  }
}

// Mixing and noise are training's alone, and members mix among themselves.
TEST(ExpertEmbeddingTest, AShareOfOneIsTheSequenceItself) {
  SpeculationConfig config = SmallSpeculation("interlayer");
  config.dropout = 0;
  const auto model = MakeSpeculationModel(config, 7);
  RoutingWindow window = SomeWindow(Stack::kEncoder, 1);
  const auto plain = model->Forward(window, 5).logits_BTHE.detach();
  window.training.order_B = at::tensor({1, 0}, at::kLong);
  window.training.share_B = at::tensor({1., .5}, at::kFloat);
  const auto mixed = model->Forward(window, 5).logits_BTHE.detach();
  EXPECT_TRUE(at::allclose(mixed[0], plain[0], 1e-4, 1e-5));
  EXPECT_FALSE(at::allclose(mixed[1], plain[1]));
}

TEST(ExpertEmbeddingTest, NoiseIsAFunctionOfTheKey) {
  SpeculationConfig config = SmallSpeculation("interlayer");
  config.dropout = 0;
  const auto model = MakeSpeculationModel(config, 7);
  RoutingWindow window = SomeWindow(Stack::kDecoder, 1);
  const auto served = model->Forward(window, 0).logits_BTHE.detach();
  window.training.noise = 0.05;
  const auto a = model->Forward(window, 5).logits_BTHE.detach();
  EXPECT_TRUE(at::equal(a, model->Forward(window, 5).logits_BTHE.detach()));
  EXPECT_FALSE(at::equal(a, model->Forward(window, 6).logits_BTHE.detach()));
  EXPECT_TRUE(at::equal(served, model->Forward(window, 0).logits_BTHE.detach()));
}

TEST(StaleCorrectionTest, WithoutACorrectionItIsTheStaleGate) {
  const c10::NoGradGuard no_grad;
  const MoeGeometry g = SmallGeometry();
  at::manual_seed(3);
  std::vector<RouterWeights> routers;
  for (int l = 0; l < g.num_layers(); ++l) {
    routers.push_back({at::randn({5, 6}), at::randn({5}), at::rand({6}) + 0.5});
  }
  const auto model = MakeSpeculationModel(SmallSpeculation("stale_correction"), 1);
  model->FitRouters(routers);
  model->parameters().Get("up").zero_();
  const auto gate = MakeBaseline("stale_gate", nullptr, g, routers);
  const auto window = WindowOf(RandomTrace(g, 6, 5, 1), Stack::kEncoder, 1, 5);
  const auto got = at::softmax(model->Forward(window, 0).logits_BTHE, -1);
  for (int lead = 1; lead <= 2; ++lead) {
    EXPECT_TRUE(
        at::allclose(got.select(2, lead - 1), *gate->Predict(window, lead), 1e-4, 1e-6));
  }
  EXPECT_THROW(model->FitRouters({}), UsageError);
}

}  // namespace
}  // namespace routecast
