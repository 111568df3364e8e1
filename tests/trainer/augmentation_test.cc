// What augmentation hides, moves and relabels, and that it is a function of its key.
#include "trainer/augmentation.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <vector>

#include "common/errors.h"

namespace routecast {
namespace {

// Two sequences of a decoder of 3 layers and 5 experts.
SpeculationBatch Batch() {
  SpeculationBatch batch;
  RoutingWindow& w = batch.window;
  w.stack = Stack::kDecoder;
  w.source_layer = 1;
  w.num_layers = 3;
  w.num_experts = 5;
  w.token_ids_BT = at::arange(48).view({2, 24});
  w.valid_BT = at::ones({2, 24}, at::kBool);
  w.valid_BT[1].narrow(0, 12, 12).fill_(false);
  w.experts_BTL = at::arange(2 * 24 * 3).view({2, 24, 3}).remainder(5);
  w.hidden_BTD = at::rand({2, 24, 4}) + 1;
  batch.labels_BTH = at::arange(2 * 24 * 3).view({2, 24, 3}).remainder(5);
  batch.labels_BTH[1].narrow(0, 12, 12).fill_(-100);
  batch.documents_BT = at::ones({2, 24}, at::kLong);
  return batch;
}

TEST(AugmentationTest, IsAFunctionOfItsKey) {
  AugmentOptions options;
  options.layer_dropout = options.mask = 0.4;
  options.subsequence = options.permutation = 0.5;
  SpeculationBatch a = Batch(), b = Batch();
  Augment(options, 7, &a);
  at::manual_seed(1);
  Augment(options, 7, &b);
  EXPECT_TRUE(at::equal(a.window.experts_BTL, b.window.experts_BTL));
  EXPECT_TRUE(at::equal(a.labels_BTH, b.labels_BTH));
  SpeculationBatch c = Batch();
  Augment(options, 8, &c);
  EXPECT_FALSE(at::equal(a.window.experts_BTL, c.window.experts_BTL));
}

TEST(AugmentationTest, NothingIsChangedWithoutOptions) {
  SpeculationBatch batch = Batch();
  const SpeculationBatch before = batch;
  Augment({}, 7, &batch);
  EXPECT_TRUE(batch.window.experts_BTL.is_same(before.window.experts_BTL));
  EXPECT_FALSE(batch.weights_BT.defined());
}

TEST(AugmentationTest, TheNewestLayerStays) {
  AugmentOptions options;
  options.layer_dropout = 0.99;
  SpeculationBatch batch = Batch();
  const auto before = batch.window.experts_BTL.clone();
  Augment(options, 3, &batch);
  EXPECT_TRUE(at::equal(batch.window.experts_BTL.select(2, 1), before.select(2, 1)));
  EXPECT_TRUE(batch.window.experts_BTL.select(2, 0).eq(5).any().item<bool>());
}

// The state after a token's last layer tells what that layer chose, one token later.
TEST(AugmentationTest, AMaskedLastLayerTakesTheStateThatTellsIt) {
  int last = 0;
  for (uint64_t key = 0; key < 60; ++key) {
    SpeculationBatch batch = Batch();
    batch.window.context_BTD = at::rand({2, 24, 4}) + 1;
    Augment({.mask = 0.99, .mask_mode = "layer"}, key, &batch, 3);
    for (int b = 0; b < 2; ++b) {
      const bool gone = batch.window.experts_BTL[b].select(1, 2).eq(5).all().item<bool>();
      EXPECT_EQ(batch.window.context_BTD[b].eq(0).all().item<bool>(), gone);
      last += gone;
    }
  }
  EXPECT_GT(last, 0);
  EXPECT_LT(last, 120);
}

TEST(AugmentationTest, LayersOfEarlierTokensAreDroppedToTheLast) {
  AugmentOptions options;
  options.layer_dropout = 0.9;
  int last = 0;
  for (uint64_t key = 0; key < 20; ++key) {
    SpeculationBatch batch = Batch();
    Augment(options, key, &batch);
    last += batch.window.experts_BTL[0].select(1, 2).eq(5).all().item<bool>();
    // Before any layer of the token, the newest is the last of the token before.
    batch = Batch();
    batch.window.source_layer = -1;
    const auto before = batch.window.experts_BTL.select(2, 2).clone();
    Augment(options, key, &batch);
    EXPECT_TRUE(at::equal(batch.window.experts_BTL.select(2, 2), before));
  }
  EXPECT_GT(last, 10);
}

TEST(AugmentationTest, PartsMoveLabelsWithTokens) {
  AugmentOptions options;
  options.subsequence = 1;
  SpeculationBatch batch = Batch();
  Augment(options, 5, &batch);
  for (int b = 0; b < 2; ++b) {
    const auto valid = batch.window.valid_BT[b];
    const int64_t count = valid.sum().item<int64_t>();
    ASSERT_GE(count, 8);
    const int64_t first = batch.window.token_ids_BT[b][0].item<int64_t>() - 24 * b;
    const SpeculationBatch whole = Batch();
    EXPECT_TRUE(at::equal(batch.window.experts_BTL[b].narrow(0, 0, count),
                          whole.window.experts_BTL[b].narrow(0, first, count)));
    EXPECT_TRUE(at::equal(batch.labels_BTH[b].narrow(0, 0, count - 1),
                          whole.labels_BTH[b].narrow(0, first, count - 1)));
    // Leads into the token after the part count no more: 1 own layer is left of 3.
    if (first + count < (b == 0 ? 24 : 12)) {
      EXPECT_EQ(batch.labels_BTH[b][count - 1][1].item<int>(), -100);
      EXPECT_NE(batch.labels_BTH[b][count - 1][0].item<int>(), -100);
    }
    EXPECT_TRUE(
        batch.labels_BTH[b].narrow(0, count, 24 - count).eq(-100).all().item<bool>());
  }
}

TEST(AugmentationTest, RelabellingIsConsistent) {
  AugmentOptions options;
  options.permutation = 1;
  SpeculationBatch batch = Batch();
  batch.window.experts_BTL[0][0][0] = 5;  // unknown stays unknown
  const auto ids = batch.window.experts_BTL.clone(), labels = batch.labels_BTH.clone();
  Augment(options, 5, &batch);
  std::vector<int64_t> name(5, -1);
  for (int64_t i = 1; i < ids[0].numel(); ++i) {
    const auto from = ids[0].flatten()[i].item<int64_t>();
    const auto to = batch.window.experts_BTL[0].flatten()[i].item<int64_t>();
    if (name[size_t(from)] < 0) name[size_t(from)] = to;
    EXPECT_EQ(name[size_t(from)], to);
    EXPECT_EQ(batch.labels_BTH[0].flatten()[i].item<int64_t>(),
              name[size_t(labels[0].flatten()[i].item<int64_t>())]);
  }
  EXPECT_EQ(batch.window.experts_BTL[0][0][0].item<int>(), 5);
  EXPECT_EQ(batch.labels_BTH[1][20][0].item<int>(), -100);
}

TEST(AugmentationTest, MaskedTokensAreHiddenAndWeighed) {
  AugmentOptions options;
  options.mask = 0.5;
  options.unmasked_weight = 0.1;
  SpeculationBatch batch = Batch();
  Augment(options, 5, &batch);
  const auto masked = batch.window.experts_BTL.eq(5).all(2);
  EXPECT_GT(masked.sum().item<int>(), 10);
  EXPECT_LT(masked.sum().item<int>(), 38);
  EXPECT_TRUE(at::allclose(batch.weights_BT, at::where(masked, 1.0, 0.1).to(at::kFloat)));
  EXPECT_TRUE(batch.window.hidden_BTD.abs().sum(2).eq(0).eq(masked).all().item<bool>());
}

TEST(AugmentationTest, AMaskedBlockIsOneRunOfItsShare) {
  SpeculationBatch batch = Batch();
  Augment({.mask = 0.25, .unmasked_weight = 0.1, .mask_mode = "block"}, 5, &batch);
  const auto masked = batch.window.experts_BTL.eq(5).all(2).to(at::kLong);
  EXPECT_EQ(masked[0].sum().item<int>(), 6);  // of 24
  EXPECT_EQ(masked[1].sum().item<int>(), 3);  // of 12 real ones
  for (int b = 0; b < 2; ++b) {
    const auto edges = masked[b].diff().abs().sum().item<int>();
    EXPECT_LE(edges, 2) << "in pieces";
  }
  EXPECT_TRUE(
      at::allclose(batch.weights_BT, at::where(masked.eq(1), 1.0, 0.1).to(at::kFloat)));
  EXPECT_TRUE(
      batch.window.hidden_BTD.abs().sum(2).eq(0).eq(masked.eq(1)).all().item<bool>());
}

// Uniform masking of tokens, or of single entries, would leave columns in part.
TEST(AugmentationTest, LayerAwareMaskingHidesOneWholeLayer) {
  constexpr int kDraws = 600;
  int hidden = 0, by_layer[3] = {};
  for (uint64_t key = 0; key < kDraws; ++key) {
    SpeculationBatch batch = Batch();
    const auto before = batch.window.experts_BTL.clone();
    Augment({.mask = 0.3, .unmasked_weight = 0.1, .mask_mode = "layer"}, key, &batch, 2);
    for (int b = 0; b < 2; ++b) {
      const auto& ids = batch.window.experts_BTL[b];
      const auto gone = ids.eq(5);
      const auto columns = gone.all(0);
      EXPECT_TRUE(at::equal(gone, columns.unsqueeze(0).expand_as(gone))) << "in part";
      EXPECT_TRUE(at::equal(at::where(gone, 5, before[b]), ids));
      const int count = columns.sum().item<int>();
      EXPECT_LE(count, 1);
      EXPECT_EQ(batch.weights_BT[b].eq(1).all().item<bool>(), count == 1);
      EXPECT_FLOAT_EQ(batch.weights_BT[b][3].item<float>(), count == 1 ? 1 : 0.1f);
      // The state is that of the source layer, and tells its choice.
      const bool source = columns[1].item<bool>();
      EXPECT_EQ(batch.window.hidden_BTD[b].eq(0).all().item<bool>(), source);
      hidden += count;
      for (int l = 0; l < 3; ++l) by_layer[l] += columns[l].item<bool>();
    }
  }
  EXPECT_NEAR(hidden, 0.3 * 2 * kDraws, 60);
  EXPECT_NEAR(by_layer[0], hidden / 2, 40);  // the newest two, evenly
  EXPECT_NEAR(by_layer[1], hidden / 2, 40);
  EXPECT_EQ(by_layer[2], 0);  // the third newest is no context of this model
}

TEST(AugmentationTest, AMaskedLayerOfAnEncoderIsAKnownOne) {
  for (uint64_t key = 0; key < 50; ++key) {
    SpeculationBatch batch = Batch();
    batch.window.stack = Stack::kEncoder;
    batch.window.source_layer = 0;
    batch.window.experts_BTL.narrow(2, 1, 2).fill_(5);
    const auto before = batch.window.experts_BTL.narrow(2, 1, 2).clone();
    Augment({.mask = 0.99, .mask_mode = "layer"}, key, &batch, 4);
    EXPECT_TRUE(batch.window.experts_BTL[0].select(1, 0).eq(5).all().item<bool>() ||
                key > 0);
    EXPECT_TRUE(at::equal(batch.window.experts_BTL.narrow(2, 1, 2), before));
    batch = Batch();
    batch.window.source_layer = -1;  // nothing is known
    batch.window.stack = Stack::kEncoder;
    const auto ids = batch.window.experts_BTL.clone();
    Augment({.mask = 0.99, .mask_mode = "layer"}, key, &batch, 4);
    EXPECT_TRUE(at::equal(batch.window.experts_BTL, ids));
  }
}

TEST(AugmentationTest, AModeWithoutAMaskIsRefused) {
  EXPECT_THROW(AugmentOptions{.mask_mode = "layer"}.Validate(), UsageError);
  EXPECT_THROW((AugmentOptions{.mask = 0.1, .mask_mode = "column"}.Validate()),
               UsageError);
  EXPECT_NO_THROW((AugmentOptions{.mask = 0.1, .mask_mode = "layer"}.Validate()));
}

}  // namespace
}  // namespace routecast
