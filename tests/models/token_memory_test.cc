// Serving a decoder token by token: what is kept of the tokens before changes no answer.
#include "models/token_memory.h"

#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include <functional>

#include "models/expert_predictor.h"
#include "speculation_test_support.h"

namespace routecast {
namespace {

constexpr int kTokens = 12, kUnknown = 5;

// The first `tokens` tokens as they are known when the last of them is at `source`: its
// own later layers are not.
RoutingWindow Known(const RoutingWindow& whole, int64_t tokens) {
  RoutingWindow w = whole;
  for (at::Tensor* rows : {&w.token_ids_BT, &w.valid_BT, &w.experts_BTL, &w.others_BTLK,
                           &w.hidden_BTD, &w.context_BTD}) {
    if (rows->defined()) *rows = rows->narrow(1, 0, tokens).clone();
  }
  w.experts_BTL.select(1, tokens - 1).slice(1, w.source_layer + 1).fill_(kUnknown);
  return w;
}

class ServedTokens : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    const c10::NoGradGuard no_grad;
    for (SpeculationModel* model : {served_.get(), plain_.get()}) {
      at::manual_seed(5);
      for (const auto& [name, tensor] : model->constants().items()) tensor.normal_();
    }
    served_->PrepareServing();
  }
  // One for each source layer.
  static std::vector<RoutingWindow> Windows(const std::vector<RoutingTrace>& traces) {
    std::vector<RoutingWindow> all;
    for (int s = -1; s < SmallGeometry().decoder_layers; ++s) {
      all.push_back(BatchOf(traces, Stack::kDecoder, s, kUnknown));
    }
    return all;
  }
  // What is asked of the served model against a whole pass of one that keeps nothing.
  void Ask(const RoutingWindow& window) {
    const c10::NoGradGuard no_grad;
    const auto all = plain_->Forward(window, 0);
    const int64_t last = window.token_ids_BT.size(1) - 1;
    const auto got = served_->ForwardLast(window);
    EXPECT_TRUE(
        at::allclose(got.logits_BTHE, all.logits_BTHE.narrow(1, last, 1), 1e-5, 1e-5))
        << "source " << window.source_layer << ", token " << last << ": "
        << (got.logits_BTHE - all.logits_BTHE.narrow(1, last, 1))
               .abs()
               .max()
               .item<float>();
    EXPECT_TRUE(at::allclose(got.confidence_BTH, all.confidence_BTH.narrow(1, last, 1),
                             1e-5, 1e-5));
  }
  void AskAll(const std::vector<RoutingWindow>& windows, int64_t tokens) {
    for (const RoutingWindow& window : windows) Ask(Known(window, tokens));
  }
  std::unique_ptr<SpeculationModel> served_ =
      MakeSpeculationModel(SmallSpeculation(GetParam()), 7);
  std::unique_ptr<SpeculationModel> plain_ =
      MakeSpeculationModel(SmallSpeculation(GetParam()), 7);
};

// `hidden` sees few tokens and computes the newest alone: hidden_model_test.
std::vector<std::string> KeepingKinds() {
  auto kinds = SpeculationKinds();
  std::erase(kinds, "hidden");
  return kinds;
}
INSTANTIATE_TEST_SUITE_P(Kinds, ServedTokens, testing::ValuesIn(KeepingKinds()),
                         [](const auto& info) { return info.param; });

TEST_P(ServedTokens, EveryAnswerIsThatOfAWholePass) {
  const auto windows = Windows({RandomTrace(SmallGeometry(), 6, kTokens, 1)});
  for (int t = 1; t <= kTokens; ++t) AskAll(windows, t);
}

// Speculation that was off for some tokens, a prompt of several, a question twice.
TEST_P(ServedTokens, TokensMayBeLeftOutAndAskedAgain) {
  const auto windows = Windows({RandomTrace(SmallGeometry(), 6, kTokens, 2)});
  for (const int t : {3, 4, 4, 9, 8, 9, 12, 12}) AskAll(windows, t);
  for (int t = 1; t <= kTokens; ++t) Ask(Known(windows[size_t(t % 4)], t));
}

TEST_P(ServedTokens, AnotherSequenceBeginsAnew) {
  const auto one = Windows({RandomTrace(SmallGeometry(), 6, kTokens, 3)});
  const auto other = Windows({RandomTrace(SmallGeometry(), 5, kTokens, 4)});
  for (const int t : {1, 2, 3}) AskAll(one, t);
  for (const int t : {1, 2, 5}) AskAll(other, t);
  for (const int t : {5, 6}) AskAll(one, t);  // as if it had gone on meanwhile
}

// A next token that was guessed wrong, experts that were recorded otherwise.
TEST_P(ServedTokens, ATokenThatWasAnotherIsComputedAgain) {
  auto windows = Windows({RandomTrace(SmallGeometry(), 6, kTokens, 5)});
  for (const int t : {6, 7}) AskAll(windows, t);
  for (RoutingWindow& w : windows) {
    w.token_ids_BT.select(1, 6).fill_(10);
    w.experts_BTL.select(1, 3).fill_(1);
    if (w.hidden_BTD.defined()) w.hidden_BTD.select(1, 5).neg_();
  }
  for (const int t : {7, 8}) AskAll(windows, t);
}

TEST_P(ServedTokens, SequencesOfABatchMayEnd) {
  auto windows = Windows({RandomTrace(SmallGeometry(), 6, kTokens, 6),
                          RandomTrace(SmallGeometry(), 4, 5, 7)});
  for (int t = 1; t <= 8; ++t) AskAll(windows, t);
  for (RoutingWindow& w : windows) {  // one sequence is left
    for (at::Tensor* rows : {&w.token_ids_BT, &w.valid_BT, &w.experts_BTL, &w.hidden_BTD,
                             &w.context_BTD, &w.source_BSD, &w.source_valid_BS}) {
      if (rows->defined()) *rows = rows->narrow(0, 0, 1).contiguous();
    }
  }
  for (const int t : {8, 9}) AskAll(windows, t);
}

TEST_P(ServedTokens, AWindowMayLoseItsFirstTokens) {
  const auto windows = Windows({RandomTrace(SmallGeometry(), 6, kTokens, 8)});
  for (const int t : {5, 6}) AskAll(windows, t);
  for (int t = 7; t <= kTokens; ++t) {
    for (const RoutingWindow& window : windows) {
      RoutingWindow w = WithoutTokens(Known(window, t), 4);
      w.before_BL = at::Tensor();  // forgotten, as the runtime does
      for (at::Tensor* rows : {&w.token_ids_BT, &w.valid_BT, &w.experts_BTL,
                               &w.hidden_BTD, &w.context_BTD}) {
        if (rows->defined()) *rows = rows->contiguous();
      }
      Ask(w);
    }
  }
}

// New weights: what was computed with the old ones is forgotten.
TEST_P(ServedTokens, PreparingAgainForgets) {
  const auto windows = Windows({RandomTrace(SmallGeometry(), 6, kTokens, 9)});
  AskAll(windows, 5);
  const c10::NoGradGuard no_grad;
  for (SpeculationModel* model : {served_.get(), plain_.get()}) {
    for (const auto& [name, tensor] : model->parameters().items()) tensor.mul_(1.25);
  }
  served_->PrepareServing();
  AskAll(windows, 6);
}

TEST(ServedTokensTest, ContextsOfDifferentLengthAreKeptApart) {
  const c10::NoGradGuard no_grad;
  SpeculationConfig config = SmallSpeculation("interlayer");
  const auto served = MakeSpeculationModel(config, 7),
             plain = MakeSpeculationModel(config, 7);
  served->PrepareServing();
  const auto whole = BatchOf({RandomTrace(SmallGeometry(), 6, kTokens, 1)},
                             Stack::kDecoder, 1, kUnknown);
  for (int t = 1; t <= kTokens; ++t) {
    for (const int layers : {1, 2, 0}) {
      RoutingWindow window = Known(whole, t);
      window.context_layers = layers;
      EXPECT_TRUE(at::allclose(served->ForwardLast(window).logits_BTHE,
                               plain->Forward(window, 0).logits_BTHE.narrow(1, t - 1, 1),
                               1e-5, 1e-5));
    }
  }
}

// All choices of models that route to several experts are compared.
TEST(ServedTokensTest, FurtherChoicesAreSeen) {
  const c10::NoGradGuard no_grad;
  SpeculationConfig config = SmallSpeculation("interlayer");
  config.geometry.experts_per_token = 3;
  const auto served = MakeSpeculationModel(config, 7),
             plain = MakeSpeculationModel(config, 7);
  served->PrepareServing();
  auto whole = BatchOf({RandomTrace(SmallGeometry(), 6, kTokens, 1)}, Stack::kDecoder, 1,
                       kUnknown);
  at::manual_seed(1);
  whole.others_BTLK = at::randint(0, 5, {1, kTokens, 3, 2}, at::kLong);
  const auto ask = [&](int64_t tokens) {
    RoutingWindow window = Known(whole, tokens);
    window.others_BTLK.select(1, tokens - 1).slice(1, 2).fill_(kUnknown);
    EXPECT_TRUE(at::allclose(
        served->ForwardLast(window).logits_BTHE,
        plain->Forward(window, 0).logits_BTHE.narrow(1, tokens - 1, 1), 1e-5, 1e-5));
  };
  for (const int t : {1, 2, 3, 6}) ask(t);
  whole.others_BTLK.select(1, 2).remainder_(4).add_(1);
  for (const int t : {6, 7}) ask(t);
}

TEST(TokenMemoryTest, AStoreGrowsAndForgets) {
  TokenMemory memory;
  at::Tensor all;
  const auto rows = at::arange(200).view({1, 100, 2});
  const auto pass = [&](int64_t known, int64_t fresh) {
    memory.Begin(known, fresh);
    EXPECT_EQ(memory.Newest().defined(), known > 0);
    all = memory.Append(rows.narrow(1, 2 * known, 2 * fresh), 1);
    EXPECT_TRUE(at::equal(all, rows.narrow(1, 0, 2 * (known + fresh))));
  };
  pass(0, 3);
  pass(3, 1);
  pass(4, 30);  // more room than there was
  EXPECT_TRUE(at::equal(all, rows.narrow(1, 0, 68)));
  pass(2, 1);  // later ones are forgotten
  memory.Begin(3, 1);
  EXPECT_TRUE(at::equal(memory.Newest(), rows.narrow(1, 4, 2)));
  EXPECT_EQ(memory.bytes(), 64 * 2 * 2 * 8);  // tokens, rows, numbers
  memory.Append(rows.narrow(1, 6, 2), 1);
  EXPECT_THROW(memory.Append(rows.narrow(1, 6, 2), 1), std::logic_error);
}

// A predictor that says how many tokens it needs, and whether it keeps them.
class Keeping final : public ExpertPredictor {
 public:
  explicit Keeping(bool keeps) : keeps_(keeps) {}
  std::string name() const override { return "keeping"; }
  bool needs_hidden() const override { return false; }
  int history_tokens() const override { return 4; }
  bool keeps_tokens() const override { return keeps_; }
  std::optional<at::Tensor> Predict(const RoutingWindow&, int) override { return {}; }

 private:
  bool keeps_;
};

TEST(KeptTokensTest, AWindowGrowsToTwiceTheHistoryWhereTokensAreKept) {
  const auto lengths = [](const Keeping& predictor) {
    std::vector<int64_t> held;
    for (int64_t t = 0, now = 0; t < 14; ++t) {
      now = KeptTokens(predictor, now, 1) + 1;
      held.push_back(now);
    }
    return held;
  };
  EXPECT_EQ(lengths(Keeping(false)),
            (std::vector<int64_t>{1, 2, 3, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4}));
  EXPECT_EQ(lengths(Keeping(true)),
            (std::vector<int64_t>{1, 2, 3, 4, 5, 6, 7, 8, 4, 5, 6, 7, 8, 4}));
  EXPECT_EQ(KeptTokens(Keeping(true), 6, 9), 0);
}

}  // namespace
}  // namespace routecast
