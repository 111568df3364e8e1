// What the recorder keeps of a pass, against loops over single elements.
#include "collector/routing_recorder.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "common/errors.h"

namespace routecast {
namespace {

constexpr int64_t kRows = 3, kTokens = 5;

struct Pass {
  explicit Pass(int64_t experts, bool halves) {
    at::manual_seed(experts);
    logits = at::randn({kRows, kTokens, experts}, at::kFloat);
    if (halves) logits = (logits * 2).round();  // ties
    routing.logits_BTE = logits;
    const at::Tensor probs = logits.softmax(-1);
    routing.expert_ids_BT = probs.argmax(-1);
    routing.gate_probs_BT = probs.amax(-1);
    routing.dropped_BT = at::rand({kRows, kTokens}) < 0.3;
    routing.input_BTD = at::randn({kRows, kTokens, 4});
    info.token_ids_BT = at::randint(3, 99, {kRows, kTokens}, at::kLong);
    info.valid_BT = at::ones({kRows, kTokens}, at::kBool);
    info.valid_BT[1].slice(0, 2).fill_(false);  // padding behind
    info.valid_BT[2][0] = false;                // and before
  }
  bool Valid(int64_t b, int64_t t) const { return info.valid_BT[b][t].item<bool>(); }
  at::Tensor logits;
  LayerRouting routing;
  PassInfo info;
};

class RecorderTest : public testing::TestWithParam<int> {};

TEST_P(RecorderTest, KeepsRealTokensAsTheyAre) {
  const int experts = GetParam(), top_k = std::min(experts, 3);
  for (const bool halves : {false, true}) {
    const Pass pass(experts, halves);
    RoutingRecorder recorder({1, 0, experts, 1, 4}, {true, top_k}, {true, false, true});
    for (int twice = 0; twice < 2; ++twice) {  // passes are joined along tokens
      recorder.OnPassBegin(pass.info);
      recorder.OnRouting(pass.routing);
      recorder.OnPassEnd(pass.info);
    }
    for (int64_t b = 0; b < kRows; ++b) {
      const RoutingSpan span = recorder.Take(Stack::kEncoder, static_cast<int>(b));
      size_t i = 0;
      for (int64_t t = 0; t < 2 * kTokens; ++t) {
        const int64_t at = t % kTokens;
        if (!pass.Valid(b, at)) continue;
        std::vector<float> sorted;
        for (int64_t e = 0; e < experts; ++e) {
          sorted.push_back(pass.logits[b][at][e].item<float>());
        }
        std::sort(sorted.rbegin(), sorted.rend());
        ASSERT_LT(i, span.expert_ids.size());
        EXPECT_EQ(span.token_ids[i], pass.info.token_ids_BT[b][at].item<int64_t>());
        EXPECT_EQ(span.expert_ids[i], pass.routing.expert_ids_BT[b][at].item<int64_t>());
        EXPECT_EQ(span.gate_probs[i], pass.routing.gate_probs_BT[b][at].item<float>());
        EXPECT_EQ(span.dropped[i], pass.routing.dropped_BT[b][at].item<bool>());
        EXPECT_EQ(span.margins[i], experts == 1 ? 0 : sorted[0] - sorted[1]);
        const at::Tensor probs = pass.logits[b][at].softmax(-1);
        for (int j = 0; j < top_k; ++j) {
          const size_t place = i * static_cast<size_t>(top_k) + static_cast<size_t>(j);
          const int64_t id = span.topk_ids[place];
          EXPECT_EQ(pass.logits[b][at][id].item<float>(), sorted[static_cast<size_t>(j)]);
          EXPECT_FLOAT_EQ(span.topk_probs[place], probs[id].item<float>());
        }
        ++i;
      }
      EXPECT_EQ(span.num_tokens, static_cast<int>(i));
      EXPECT_EQ(span.expert_ids.size(), i);
      EXPECT_EQ(span.topk_ids.size(), i * static_cast<size_t>(top_k));
      EXPECT_EQ(span.hidden.size(), b == 1 ? 0 : i * 4);
    }
  }
}

// Widths that are and are not whole vectors.
INSTANTIATE_TEST_SUITE_P(Experts, RecorderTest,
                         testing::Values(1, 2, 7, 16, 17, 64, 128));

TEST(Recorder, WithoutProbabilitiesAndTopKThereAreNone) {
  const Pass pass(16, false);
  RoutingRecorder recorder({1, 0, 16, 1, 4}, {false, 0}, {false, false, false});
  recorder.OnPassBegin(pass.info);
  recorder.OnRouting(pass.routing);
  recorder.OnPassEnd(pass.info);
  const RoutingSpan span = recorder.Take(Stack::kEncoder, 0);
  EXPECT_EQ(span.margins.size(), static_cast<size_t>(kTokens));
  EXPECT_TRUE(span.gate_probs.empty() && span.topk_ids.empty() && span.hidden.empty());
}

// Such a token would be recorded as one that chose expert 0.
TEST_P(RecorderTest, AChoiceFromNoNumbersIsRefusedWithItsLayer) {
  const int experts = GetParam();
  for (const bool real : {true, false}) {
    Pass pass(experts, false);
    pass.logits[2][real ? 1 : 0][experts - 1] = std::nan("");  // [2][0] is padding
    pass.routing.gate_probs_BT = pass.logits.softmax(-1).amax(-1);
    RoutingRecorder recorder({1, 0, experts, 1, 4}, {false, 0}, {false, false, false});
    const auto record = [&] {
      recorder.OnPassBegin(pass.info);
      recorder.OnRouting(pass.routing);
      recorder.OnPassEnd(pass.info);
      recorder.Take(Stack::kEncoder, 2);
    };
    if (!real) {
      EXPECT_NO_THROW(record());
      continue;
    }
    try {
      record();
      ADD_FAILURE() << "recorded";
    } catch (const DataError& e) {
      EXPECT_NE(std::string(e.what()).find("layer 0 of the encoder"), std::string::npos)
          << e.what();
    }
  }
}

TEST_P(RecorderTest, WhereAskedForSuchRowsAreMarked) {
  const int experts = GetParam();
  Pass pass(experts, false);
  pass.logits[2][1][experts - 1] = std::nan("");
  pass.routing.gate_probs_BT = pass.logits.softmax(-1).amax(-1);
  RoutingRecorder recorder({1, 0, experts, 1, 4},
                           {.probs = false, .mark_no_numbers = true},
                           {false, false, false});
  recorder.OnPassBegin(pass.info);
  recorder.OnRouting(pass.routing);
  recorder.OnPassEnd(pass.info);
  for (int row = 0; row < 3; ++row) EXPECT_EQ(recorder.NoNumbers(row), row == 2);
}

}  // namespace
}  // namespace routecast
