// What a recorder keeps of a pass: real tokens of the rows asked for, and nothing else.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

#include "collector/routing_recorder.h"

namespace routecast {
namespace {

constexpr int kWidth = 4;

MoeGeometry Geometry() {
  MoeGeometry g;
  g.encoder_layers = 1;
  g.decoder_layers = 2;
  g.num_experts = 3;
  g.d_model = kWidth;
  return g;
}

LayerRouting Routing(int layer, int64_t rows, int64_t tokens) {
  LayerRouting routing;
  routing.layer = layer;
  routing.input_BTD = at::full({rows, tokens, kWidth}, layer);
  routing.logits_BTE = at::zeros({rows, tokens, 3});
  routing.expert_ids_BT = at::zeros({rows, tokens}, at::kLong);
  routing.gate_probs_BT = at::ones({rows, tokens});
  routing.dropped_BT = at::zeros({rows, tokens}, at::kBool);
  return routing;
}

// A decoder pass of one token a row; row 1 has ended where `ended`.
void Step(RoutingRecorder* recorder, int64_t position, bool ended) {
  PassInfo pass;
  pass.stack = Stack::kDecoder;
  pass.token_ids_BT = at::full({2, 1}, position + 5, at::kLong);
  pass.valid_BT = at::ones({2, 1}, at::kBool);
  if (ended) pass.valid_BT[1][0] = false;
  pass.first_position = static_cast<int>(position);
  recorder->OnPassBegin(pass);
  for (const int layer : {1, 2}) recorder->OnRouting(Routing(layer, 2, 1));
  pass.output_BTD =
      at::arange(2 * kWidth, at::kFloat).view({2, 1, kWidth}) + 100 * position;
  recorder->OnPassEnd(pass);
}

std::vector<float> Floats(const std::vector<uint16_t>& bits) {
  std::vector<float> values;
  for (const uint16_t b : bits) values.push_back(Bf16ToFloat(b));
  return values;
}

TEST(RecordedStatesTest, KeepsTheDecodersOutputOfRealTokensStepByStep) {
  RoutingRecorder recorder(Geometry(), {.output = true}, {true, true});
  for (int64_t t = 0; t < 2; ++t) Step(&recorder, t, /*ended=*/t == 1);
  const RoutingSpan first = recorder.Take(Stack::kDecoder, 0);
  EXPECT_EQ(first.num_tokens, 2);
  EXPECT_EQ(Floats(first.output), (std::vector<float>{0, 1, 2, 3, 100, 101, 102, 103}));
  const RoutingSpan second = recorder.Take(Stack::kDecoder, 1);
  EXPECT_EQ(second.num_tokens, 1);
  EXPECT_EQ(Floats(second.output), (std::vector<float>{4, 5, 6, 7}));
}

TEST(RecordedStatesTest, RowsThatAreNotAskedForHaveNoStates) {
  RoutingRecorder recorder(Geometry(), {.output = true}, {false, true});
  Step(&recorder, 0, false);
  const RoutingSpan without = recorder.Take(Stack::kDecoder, 0);
  EXPECT_EQ(without.hidden_width, 0);
  EXPECT_TRUE(without.hidden.empty());
  EXPECT_TRUE(without.output.empty());
  const RoutingSpan with = recorder.Take(Stack::kDecoder, 1);
  EXPECT_EQ(with.hidden_width, kWidth);
  EXPECT_EQ(with.hidden.size(), 2u * kWidth);
  EXPECT_EQ(with.output.size(), 1u * kWidth);
}

// One row of three encoder tokens (the last is padding), two heads.
TEST(RecordedStatesTest, SummarisesAttentionByHead) {
  RoutingRecorder recorder(Geometry(), {.attention = true}, {true});
  EXPECT_TRUE(recorder.WantsAttention());
  PassInfo pass;
  pass.token_ids_BT = at::full({1, 3}, 5, at::kLong);
  pass.valid_BT = at::ones({1, 3}, at::kBool);
  pass.valid_BT[0][2] = false;
  recorder.OnPassBegin(pass);
  const at::Tensor weights =
      at::tensor({0.5f, 0.5f, 0.0f,  // head 0: equal ones
                  0.0f, 1.0f, 0.0f,  //
                  1.0f, 0.0f, 0.0f,  // padding
                  0.25f, 0.75f, 0.0f, 1.0f, 0.0f, 0.0f, 0.0f, 1.0f, 0.0f});
  recorder.OnAttention({0, false, weights.view({1, 2, 3, 3})});
  recorder.OnRouting(Routing(0, 1, 3));
  recorder.OnPassEnd(pass);
  const RoutingSpan span = recorder.Take(Stack::kEncoder, 0);
  EXPECT_EQ(span.attention_heads, 2);
  ASSERT_EQ(span.attention_entropy.size(), 4u);  // token 0: heads 0, 1; token 1: 0, 1
  EXPECT_FLOAT_EQ(span.attention_entropy[0], std::log(2.0f));
  EXPECT_FLOAT_EQ(span.attention_entropy[1],
                  -0.25f * std::log(0.25f) - 0.75f * std::log(0.75f));
  EXPECT_EQ(span.attention_entropy[2], 0);
  const uint16_t no = kNoKey;
  EXPECT_EQ(span.attention_keys, (std::vector<uint16_t>{0, 1, no, no, 1, 0, no, no, 1, no,
                                                        no, no, 0, no, no, no}));
}

TEST(RecordedStatesTest, KeepsTheFourStrongestKeys) {
  RoutingRecorder recorder(Geometry(), {.attention = true}, {true});
  PassInfo pass;
  pass.token_ids_BT = at::full({1, 1}, 5, at::kLong);
  pass.valid_BT = at::ones({1, 1}, at::kBool);
  recorder.OnPassBegin(pass);
  const at::Tensor weights =
      at::tensor({0.1f, 0.3f, 0.05f, 0.2f, 0.1f, 0.15f, 0.1f}).view({1, 1, 1, 7});
  recorder.OnAttention({0, false, weights});
  recorder.OnRouting(Routing(0, 1, 1));
  recorder.OnPassEnd(pass);
  EXPECT_EQ(recorder.Take(Stack::kEncoder, 0).attention_keys,
            (std::vector<uint16_t>{1, 3, 5, 0}));
}

TEST(RecordedStatesTest, AttentionIsAskedForWhereARowIsRecorded) {
  EXPECT_FALSE(RoutingRecorder(Geometry(), {}, {true}).WantsAttention());
  EXPECT_FALSE(
      RoutingRecorder(Geometry(), {.attention = true}, {false}).WantsAttention());
}

TEST(RecordedStatesTest, WithoutTheWordThereIsNoOutput) {
  RoutingRecorder recorder(Geometry(), {}, {true, true});
  Step(&recorder, 0, false);
  const RoutingSpan span = recorder.Take(Stack::kDecoder, 0);
  EXPECT_FALSE(span.hidden.empty());
  EXPECT_TRUE(span.output.empty());
}

}  // namespace
}  // namespace routecast
