// The Switch Transformer's own properties, without a reference implementation.
#include <c10/core/Allocator.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "common/errors.h"
#include "models/attention.h"
#include "tests/models/switch_test_support.h"
#include "tests/support/reference.h"

namespace routecast {
namespace {

// Hands leases out in descending order: another order of readiness.
class ReversedSource : public ExpertSource {
 public:
  ReversedSource(MoeGeometry g, std::vector<ExpertWeights> w) : g_(g), w_(std::move(w)) {}
  void Begin(int layer, std::span<const int> experts) override {
    layer_ = layer;
    pending_.assign(experts.begin(), experts.end());
  }
  ExpertLease Next() override {
    const int e = pending_.back();
    pending_.pop_back();
    return {e, w_[static_cast<size_t>(ExpertKey{layer_, e}.Index(g_))], nullptr};
  }

 private:
  MoeGeometry g_;
  std::vector<ExpertWeights> w_;
  int layer_ = 0;
  std::vector<int> pending_;
};

struct Inputs {
  at::Tensor ids = at::randint(2, 96, {3, 14}, at::kLong);
  at::Tensor valid = at::ones({3, 14}, at::kBool);
  at::Tensor decoder = at::randint(2, 96, {3, 10}, at::kLong);
  at::Tensor decoder_valid = at::ones({3, 10}, at::kBool);
};

at::Tensor Forward(SwitchModel* model, const Inputs& in) {
  return model->Logits(model->Decode(in.decoder, in.decoder_valid,
                                     model->Encode(in.ids, in.valid), in.valid, nullptr));
}

TEST(SwitchModel, OrderOfReadinessChangesNoBit) {
  const Checkpoint c = RandomCheckpoint(SmallConfig(), 2);
  ResidentModel plain(c);
  ReversedSource source(c.config.geometry(), ExpertWeightsOf(c.config, c.parameters));
  LocalExpertExecutor executor(&source);
  SwitchModel reversed(c.config, c.parameters, &executor);
  const Inputs in;
  EXPECT_TRUE(at::equal(Forward(&plain.model(), in), Forward(&reversed, in)));
}

TEST(SwitchModel, LaterDecoderTokensDoNotChangeEarlierLogits) {
  ResidentModel model(RandomCheckpoint(SmallConfig(), 3));
  Inputs in;
  const at::Tensor before = Forward(&model.model(), in);
  in.decoder = in.decoder.clone();
  in.decoder.select(1, 7).fill_(5);
  const at::Tensor after = Forward(&model.model(), in);
  EXPECT_TRUE(at::allclose(before.narrow(1, 0, 7), after.narrow(1, 0, 7), 1e-5, 1e-5));
  EXPECT_FALSE(at::allclose(before.select(1, 7), after.select(1, 7), 1e-3, 1e-3));
}

TEST(SwitchModel, RightPaddingDoesNotChangeRealTokens) {
  ResidentModel model(RandomCheckpoint(SmallConfig(), 4));
  const Inputs in;
  const at::Tensor ids = at::constant_pad_nd(in.ids, {0, 6}, 0);
  const at::Tensor valid = at::constant_pad_nd(in.valid, {0, 6}, 0);
  EXPECT_TRUE(at::allclose(model.model().Encode(in.ids, in.valid),
                           model.model().Encode(ids, valid).narrow(1, 0, 14), 1e-4,
                           1e-4));
}

// What a budget that holds them reckons with is what is there.
TEST(SwitchModel, KeyValueBytesAreThoseOfTheCache) {
  SwitchConfig config = SmallConfig();
  config.num_decoder_layers = 3;
  config.d_kv = 6;
  config.num_sparse_decoder_layers = 1;
  ResidentModel model(RandomCheckpoint(config, 5));
  const at::Tensor ids = at::randint(2, 96, {2, 7}, at::kLong);
  const at::Tensor all = at::ones({2, 7}, at::kBool), one = at::ones({2, 1}, at::kBool);
  const at::Tensor encoded = model.model().Encode(ids, all);
  DecoderCache cache;
  for (int t = 0; t < 5; ++t) {
    model.model().Decode(at::full({2, 1}, 3, at::kLong), one, encoded, all, &cache);
  }
  size_t held = 0;
  for (const auto* part :
       {&cache.self_key, &cache.self_value, &cache.cross_key, &cache.cross_value}) {
    for (const at::Tensor& tensor : *part) held += tensor.nbytes();
  }
  EXPECT_EQ(KeyValueBytes(config, at::kFloat, 2, 7, 5),
            held + cache.self_key[0].nbytes());
}

// The same bits as a cache that grows by each token, without a copy of all at each step.
TEST(SwitchModel, ACacheWithRoomMovesSeldom) {
  ResidentModel resident(RandomCheckpoint(SmallConfig(), 5));
  SwitchModel& model = resident.model();
  constexpr int kMost = 41;
  const at::Tensor ids = at::randint(2, 96, {2, 7}, at::kLong);
  const at::Tensor steps = at::randint(2, 96, {2, kMost}, at::kLong);
  const at::Tensor all = at::ones({2, 7}, at::kBool);
  const at::Tensor encoded = model.Encode(ids, all);
  DecoderCache tight, roomy;
  roomy.most = kMost;
  std::set<const void*> places;
  for (int t = 0; t < kMost; t += t == 0 ? 3 : 1) {  // a first call of several tokens
    const at::Tensor now = steps.narrow(1, t, t == 0 ? 3 : 1);
    const at::Tensor real = at::ones_like(now, at::kBool);
    EXPECT_TRUE(at::equal(model.Decode(now, real, encoded, all, &roomy),
                          model.Decode(now, real, encoded, all, &tight)))
        << t;
    places.insert(roomy.self_key.back().const_data_ptr());
  }
  EXPECT_LE(places.size(), 4u);  // of 6, 14, 30, 41 positions
  EXPECT_EQ(roomy.self_value[0].size(2), kMost);
}

// Keeps the largest memory that was asked for.
class LargestAllocation final : public c10::Allocator {
 public:
  LargestAllocation() { c10::SetAllocator(c10::kCPU, this, /*priority=*/100); }
  ~LargestAllocation() override { c10::SetAllocator(c10::kCPU, inner_, 100); }
  c10::DataPtr allocate(size_t bytes) override {
    largest_ = std::max(largest_, bytes);
    return inner_->allocate(bytes);
  }
  void copy_data(void* to, const void* from, size_t count) const override {
    inner_->copy_data(to, from, count);
  }
  c10::DeleterFnPtr raw_deleter() const override { return inner_->raw_deleter(); }
  size_t largest() const { return largest_; }

 private:
  c10::Allocator* inner_ = c10::GetAllocator(c10::kCPU);
  size_t largest_ = 0;
};

// Of a batch of long sequences they would be most of what a pass takes.
TEST(SwitchModel, AnEncoderPassHasNoMemoryOfTheSizeOfAllScores) {
  const SwitchConfig config = SmallConfig();
  ResidentModel model(RandomCheckpoint(config, 6));
  constexpr int64_t kBatch = 12, kTokens = 120;
  const at::Tensor ids = at::randint(2, 96, {kBatch, kTokens}, at::kLong);
  const at::Tensor valid = at::ones({kBatch, kTokens}, at::kBool);
  const c10::NoGradGuard no_grad;
  if (!OwnAttentionServes(at::zeros({1}), kTokens, config.d_kv)) return;
  const LargestAllocation watch;
  model.model().Encode(ids, valid);
  EXPECT_LT(watch.largest(),
            sizeof(float) * kBatch * config.num_heads * kTokens * kTokens);
}

TEST(SwitchModel, OverrideForcesRouting) {
  class AllToThree : public RoutingOverride {
    void Replace(int, at::Tensor* ids, at::Tensor*) override { ids->fill_(3); }
  } to_three;
  ResidentModel model(RandomCheckpoint(SmallConfig(), 5));
  RoutingLog log;
  ForwardOptions options;
  options.observer = &log;
  options.routing_override = &to_three;
  const Inputs in;
  model.model().Encode(in.ids, in.valid, options);
  for (const LayerRouting& r : log.routings) {
    EXPECT_TRUE((r.expert_ids_BT == 3).all().item<bool>());
  }
}

TEST(SwitchModel, JitterIsAFunctionOfItsKey) {
  ResidentModel model(RandomCheckpoint(SmallConfig(), 6));
  const Inputs in;
  const auto logits = [&](uint64_t key) {
    RoutingLog log;
    ForwardOptions options;
    options.observer = &log;
    options.jitter = 0.1;
    options.jitter_key = key;
    model.model().Encode(in.ids, in.valid, options);
    return log.routings[0].logits_BTE;
  };
  EXPECT_TRUE(at::equal(logits(1), logits(1)));
  EXPECT_FALSE(at::equal(logits(1), logits(2)));
}

TEST(SwitchModel, WrongShapeNamesTheTensorAndBothShapes) {
  const Checkpoint c = RandomCheckpoint(SmallConfig(), 7);
  SwitchConfig wider = c.config;
  wider.d_ff = 64;
  LocalExpertExecutor executor(nullptr);
  try {
    SwitchModel model(wider, c.parameters, &executor);
    FAIL() << "a wrong shape was accepted";
  } catch (const DataError& e) {
    EXPECT_NE(std::string(e.what()).find("mlp.wi.weight"), std::string::npos);
    EXPECT_NE(std::string(e.what()).find("64"), std::string::npos);
  }
}

TEST(Checkpoint, RoundTripsAndLoadsOneExpertAlone) {
  const Checkpoint c = RandomCheckpoint(SmallConfig(), 8);
  const fs::path folder = TestFolder("checkpoint-roundtrip");
  SaveCheckpoint(folder, c.config, c.parameters, at::kFloat);
  const Checkpoint read = LoadCheckpoint(folder, at::kFloat, at::kCPU);
  for (const auto& [name, tensor] : c.parameters.items()) {
    EXPECT_TRUE(at::equal(tensor, read.parameters.Get(name))) << name;
  }
  const ExpertKey key{2, 5};
  const ExpertWeights expert = CheckpointReader(folder).ReadExpert(key, at::kFloat);
  EXPECT_TRUE(
      at::equal(expert.wi_FD, c.parameters.Get(ExpertTensorName(c.config, key, "wi"))));
  const Checkpoint rest =
      LoadCheckpoint(folder, at::kFloat, at::kCPU, ExpertLoading::kLeaveOut);
  EXPECT_FALSE(rest.parameters.Has(ExpertTensorName(c.config, key, "wi")));
}

TEST(Checkpoint, AGatedExpertLoadsAloneWithItsGate) {
  SwitchConfig config = SmallConfig();
  config.is_gated_act = true;
  const Checkpoint c = RandomCheckpoint(config, 9);
  const fs::path folder = TestFolder("checkpoint-gated");
  SaveCheckpoint(folder, c.config, c.parameters, at::kFloat);
  const ExpertKey key{1, 3};
  const ExpertWeights expert = CheckpointReader(folder).ReadExpert(key, at::kFloat);
  const auto saved = [&](const char* tensor) {
    return c.parameters.Get(ExpertTensorName(config, key, tensor));
  };
  EXPECT_TRUE(at::equal(expert.wi_FD, saved("wi_0")));
  EXPECT_TRUE(at::equal(expert.gate_FD, saved("wi_1")));
  EXPECT_TRUE(at::equal(expert.wo_DF, saved("wo")));
}

TEST(Checkpoint, MissingFolderIsAUsageError) {
  EXPECT_THROW(LoadCheckpoint("/nonexistent/model", at::kFloat, at::kCPU), UsageError);
}

}  // namespace
}  // namespace routecast
