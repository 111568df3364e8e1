// Windows and targets of several sequences against element-wise loops over their traces.
#include "models/routing_window.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "speculation_test_support.h"

namespace routecast {
namespace {

constexpr int kExperts = 5, kChosen = 3;

// Of lengths that differ in both stacks; three choices a token.
std::vector<RoutingTrace> Traces() {
  std::vector<RoutingTrace> traces;
  for (const auto& [source, target] : {std::pair{6, 5}, {3, 9}, {8, 1}}) {
    traces.push_back(
        RandomTrace(SmallGeometry(), source, target, uint64_t(10 * source + target)));
    for (RoutingSpan* span : {&traces.back().encoder, &traces.back().decoder}) {
      span->top_k = kChosen;
      for (const uint16_t first : span->expert_ids) {
        for (int k = 0; k < kChosen; ++k) {
          span->topk_ids.push_back(static_cast<uint16_t>((first + 2 * k) % kExperts));
        }
      }
    }
  }
  return traces;
}

const RoutingSpan& SpanOf(const RoutingTrace& trace, Stack stack) {
  return stack == Stack::kEncoder ? trace.encoder : trace.decoder;
}
size_t PlaceOf(const RoutingSpan& span, int64_t layer, int64_t token) {
  return static_cast<size_t>(layer * span.num_tokens + token);
}
// Router inputs of a layer at a token, [D]; zeros where the token is not there.
at::Tensor StateOf(const RoutingSpan& span, int64_t layer, int64_t token) {
  at::Tensor state = at::zeros({span.hidden_width});
  for (int64_t d = 0; token >= 0 && token < span.num_tokens && d < state.numel(); ++d) {
    const size_t at = PlaceOf(span, layer, token) * size_t(span.hidden_width) + size_t(d);
    state[d] = Bf16ToFloat(span.hidden[at]);
  }
  return state;
}

class WindowsTest : public testing::Test {
 protected:
  // Calls check(stack, source) for every source layer.
  template <typename Check>
  void EachSource(const Check& check) const {
    for (const Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
      for (int s = -1; s < SmallGeometry().layers(stack); ++s) {
        SCOPED_TRACE(std::string(StackName(stack)) + " " + std::to_string(s));
        check(stack, s);
      }
    }
  }
  int64_t Longest(Stack stack) const {
    int64_t longest = 0;
    for (const auto& t : traces_) {
      longest = std::max<int64_t>(longest, SpanOf(t, stack).num_tokens);
    }
    return longest;
  }
  std::vector<const RoutingTrace*> All() const {
    std::vector<const RoutingTrace*> all;
    for (const RoutingTrace& t : traces_) all.push_back(&t);
    return all;
  }
  std::vector<RoutingTrace> traces_ = Traces();
};

TEST_F(WindowsTest, HoldTheExpertsThatAreKnown) {
  EachSource([&](Stack stack, int source) {
    const RoutingWindow w = WindowsOf(All(), stack, source, kExperts, kChosen);
    const int64_t T = Longest(stack), L = SmallGeometry().layers(stack);
    ASSERT_EQ(w.experts_BTL.sizes(), (at::IntArrayRef{3, T, L}));
    ASSERT_EQ(w.others_BTLK.sizes(), (at::IntArrayRef{3, T, L, kChosen - 1}));
    for (int64_t b = 0; b < 3; ++b) {
      const RoutingSpan& span = SpanOf(traces_[size_t(b)], stack);
      for (int64_t t = 0; t < T; ++t) {
        const bool there = t < span.num_tokens;
        EXPECT_EQ(w.valid_BT[b][t].item<bool>(), there);
        EXPECT_EQ(w.token_ids_BT[b][t].item<int64_t>(),
                  there ? span.token_ids[size_t(t)] : 0);
        for (int64_t l = 0; l < L; ++l) {
          const bool known = there && (stack == Stack::kDecoder || l <= source);
          const size_t at = known ? PlaceOf(span, l, t) : 0;
          EXPECT_EQ(w.experts_BTL[b][t][l].item<int64_t>(),
                    known ? span.expert_ids[at] : kExperts);
          for (int64_t k = 1; k < kChosen; ++k) {
            EXPECT_EQ(w.others_BTLK[b][t][l][k - 1].item<int64_t>(),
                      known ? span.topk_ids[at * kChosen + size_t(k)] : kExperts);
          }
        }
      }
    }
  });
}

TEST_F(WindowsTest, HoldTheRouterInputsThatAreKnown) {
  EachSource([&](Stack stack, int source) {
    const RoutingWindow w = WindowsOf(All(), stack, source, kExperts);
    const bool decoder = stack == Stack::kDecoder;
    EXPECT_EQ(w.hidden_BTD.defined(), source >= 0);
    EXPECT_EQ(w.context_BTD.defined(), decoder);
    EXPECT_EQ(w.source_BSD.defined(), decoder);
    for (int64_t b = 0; b < 3; ++b) {
      const RoutingTrace& trace = traces_[size_t(b)];
      const RoutingSpan& span = SpanOf(trace, stack);
      for (int64_t t = 0; t < Longest(stack); ++t) {
        if (source >= 0) {
          EXPECT_TRUE(at::equal(w.hidden_BTD[b][t], StateOf(span, source, t)));
        }
        if (!decoder) continue;
        const bool there = t < span.num_tokens;
        EXPECT_TRUE(at::equal(w.context_BTD[b][t],
                              StateOf(span, span.num_layers - 1, there ? t - 1 : -1)));
      }
      for (int64_t s = 0; decoder && s < Longest(Stack::kEncoder); ++s) {
        EXPECT_EQ(w.source_valid_BS[b][s].item<bool>(), s < trace.encoder.num_tokens);
        EXPECT_TRUE(at::equal(w.source_BSD[b][s],
                              StateOf(trace.encoder, trace.encoder.num_layers - 1, s)));
      }
    }
  });
}

// Two heads of each attention, keys that depend on their place; every fifth is none.
void RecordAttention(RoutingTrace* trace) {
  for (RoutingSpan* span : {&trace->encoder, &trace->decoder}) {
    const bool decoder = span == &trace->decoder;
    span->attention_heads = decoder ? 4 : 2;
    const int rows = span->num_layers * span->num_tokens * span->attention_heads;
    for (int i = 0; i < rows; ++i) {
      span->attention_entropy.push_back(0.5f * static_cast<float>(i % 7));
      const bool cross = i % span->attention_heads >= 2;
      const int keys = cross ? trace->encoder.num_tokens : span->num_tokens;
      for (int k = 0; k < kStrongestKeys; ++k) {
        const int key = (3 * i + k) % keys;
        span->attention_keys.push_back((i + k) % 5 == 0 ? kNoKey
                                                        : static_cast<uint16_t>(key));
      }
    }
  }
}

TEST_F(WindowsTest, HoldWhatTheTokensLookedAtAndNoLaterToken) {
  for (RoutingTrace& trace : traces_) RecordAttention(&trace);
  EachSource([&](Stack stack, int source) {
    const RoutingWindow w = WindowsOf(All(), stack, source, kExperts);
    EXPECT_EQ(w.attended_ids_BTAK.defined(), source >= 0);
    EXPECT_EQ(w.attention_entropy_BTA.defined(), source >= 0);
    if (source < 0) return;
    const bool decoder = stack == Stack::kDecoder;
    const int64_t A = decoder ? 4 : 2;
    ASSERT_EQ(w.attended_ids_BTAK.sizes(),
              (at::IntArrayRef{3, Longest(stack), A, kStrongestKeys}));
    for (int64_t b = 0; b < 3; ++b) {
      const RoutingTrace& trace = traces_[size_t(b)];
      const RoutingSpan& span = SpanOf(trace, stack);
      for (int64_t t = 0; t < Longest(stack); ++t) {
        for (int64_t a = 0; a < A; ++a) {
          const bool there = t < span.num_tokens, cross = a >= 2;
          const size_t row = there ? PlaceOf(span, source, t) * size_t(A) + size_t(a) : 0;
          EXPECT_EQ(w.attention_entropy_BTA[b][t][a].item<float>(),
                    there ? span.attention_entropy[row] : 0);
          for (int64_t k = 0; k < kStrongestKeys; ++k) {
            const int64_t key =
                there ? span.attention_keys[row * kStrongestKeys + size_t(k)] : kNoKey;
            const bool seen = key != kNoKey && (cross || !decoder || key <= t);
            const auto& ids = cross ? trace.encoder.token_ids : span.token_ids;
            EXPECT_EQ(w.attended_ids_BTAK[b][t][a][k].item<int64_t>(),
                      seen ? int64_t{ids[size_t(key)]} : -1);
          }
        }
      }
    }
  });
}

TEST_F(WindowsTest, LeaveOutAttentionThatOneSequenceHasNot) {
  for (RoutingTrace& trace : traces_) RecordAttention(&trace);
  traces_[1].decoder.attention_heads = 0;
  EXPECT_FALSE(
      WindowsOf(All(), Stack::kDecoder, 0, kExperts).attended_ids_BTAK.defined());
  EXPECT_TRUE(WindowsOf(All(), Stack::kEncoder, 0, kExperts).attended_ids_BTAK.defined());
  EXPECT_FALSE(WindowsOf(All(), Stack::kEncoder, 0, kExperts, 1, /*router_inputs=*/false)
                   .attended_ids_BTAK.defined());
}

TEST_F(WindowsTest, LeaveOutWhatOneSequenceHasNot) {
  traces_[1].decoder.hidden.clear();
  traces_[2].encoder.topk_ids.clear();
  const auto decoder = WindowsOf(All(), Stack::kDecoder, 0, kExperts, kChosen);
  EXPECT_FALSE(decoder.hidden_BTD.defined() || decoder.context_BTD.defined());
  EXPECT_FALSE(decoder.source_BSD.defined());
  EXPECT_TRUE(decoder.others_BTLK.defined());
  const auto encoder = WindowsOf(All(), Stack::kEncoder, 0, kExperts, kChosen);
  EXPECT_TRUE(encoder.hidden_BTD.defined());
  EXPECT_FALSE(encoder.others_BTLK.defined());
  const auto unwanted =
      WindowsOf(All(), Stack::kEncoder, 0, kExperts, kChosen, /*router_inputs=*/false);
  EXPECT_FALSE(unwanted.hidden_BTD.defined());
}

TEST_F(WindowsTest, RefuseSequencesOfAnotherModel) {
  traces_[1].encoder.num_layers = 2;
  EXPECT_THROW(WindowsOf(All(), Stack::kEncoder, 0, kExperts), std::logic_error);
  EXPECT_THROW(WindowsOf({}, Stack::kEncoder, 0, kExperts), std::logic_error);
}

TEST_F(WindowsTest, TargetsAreThoseOfEachLead) {
  EachSource([&](Stack stack, int source) {
    const int L = SmallGeometry().layers(stack), H = L;
    const WindowTargets targets = WindowTargetsOf(All(), stack, source, H, kChosen);
    const WindowTargets first = WindowTargetsOf(All(), stack, source, H, 1);
    EXPECT_TRUE(at::equal(targets.labels_BTH, first.labels_BTH));
    EXPECT_FALSE(first.others_BTHK.defined());
    int64_t labels = 0;
    for (int64_t b = 0; b < 3; ++b) {
      const RoutingSpan& span = SpanOf(traces_[size_t(b)], stack);
      for (int64_t t = 0; t < Longest(stack); ++t) {
        for (int lead = 1; lead <= H; ++lead) {
          int layer = source + lead;
          int64_t token = t;
          if (stack == Stack::kDecoder && layer >= L) layer -= L, ++token;
          const bool there = layer < L && token < span.num_tokens &&
                             !span.dropped[PlaceOf(span, layer, token)];
          labels += there;
          const size_t at = there ? PlaceOf(span, layer, token) : 0;
          EXPECT_EQ(targets.labels_BTH[b][t][lead - 1].item<int64_t>(),
                    there ? span.expert_ids[at] : -100);
          for (int64_t k = 1; k < kChosen; ++k) {
            EXPECT_EQ(targets.others_BTHK[b][t][lead - 1][k - 1].item<int64_t>(),
                      there ? span.topk_ids[at * kChosen + size_t(k)] : -100);
          }
        }
      }
    }
    EXPECT_EQ(targets.num_labels, labels);
    EXPECT_EQ(first.num_labels, labels);
  });
}

}  // namespace
}  // namespace routecast
