#include "models/baseline_predictors.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "common/errors.h"

namespace routecast {
namespace {

constexpr double kCarried = 0.9;  // mass on carried ids; the rest is spread evenly
constexpr double kLayerWeights[] = {0.4, 0.3, 0.2, 0.1};  // newest layer first

struct Target {
  int layer = 0;  // in its stack
  bool next_token = false;
};

std::optional<Target> TargetOf(const RoutingWindow& window, int lead) {
  const int layer = window.source_layer + lead, layers = window.num_layers;
  if (lead < 1) return std::nullopt;
  if (layer < layers) return Target{layer, false};
  if (window.stack == Stack::kEncoder || layer - layers > window.source_layer) {
    return std::nullopt;
  }
  return Target{layer - layers, true};
}

// One token's view of a window, as plain numbers.
struct TokenView {
  const RoutingWindow* window;
  const int64_t* experts;  // [T,L] of this sequence
  int64_t token_id;
  int t;
  double state_variance;            // of the router's input; NaN where it is not known
  const int64_t* others = nullptr;  // [T,L,num_others] of this sequence
  int num_others = 0;

  struct Place {
    int back = -1, layer = 0;  // tokens before; -1 = there is none
  };

  // Expert of in-stack layer `l` at token `t - back`, -1 where not known.
  int At(int back, int l) const {
    const int layers = window->num_layers;
    const bool known =
        l >= 0 && l < layers && t >= back && (back > 0 || l <= window->source_layer);
    if (!known) return -1;
    const int64_t e = experts[int64_t{t - back} * layers + l];
    return e >= 0 && e < window->num_experts ? static_cast<int>(e) : -1;
  }
  // The `steps`-th newest routing that is known: down the layers and, in the decoder, on
  // through the tokens before.
  Place NewestPlace(int steps) const {
    const int layer = window->source_layer - steps, layers = window->num_layers;
    if (layer >= 0) return {0, layer};
    if (window->stack == Stack::kEncoder || layers == 0) return {};
    const int back = (layers - 1 - layer) / layers;
    return {back, layer + back * layers};
  }
  int Newest(int steps) const {
    const Place place = NewestPlace(steps);
    return place.back < 0 ? -1 : At(place.back, place.layer);
  }
  // Calls take(expert, how many there are) for each expert chosen there; for none where
  // the routing is not known.
  template <typename Take>
  void EachChosen(Place place, const Take& take) const {
    const int first = place.back < 0 ? -1 : At(place.back, place.layer);
    if (first < 0) return;
    take(first, num_others + 1);
    const int64_t row = (int64_t{t - place.back} * window->num_layers + place.layer);
    for (int k = 0; k < num_others; ++k) {
      const int64_t e = others[row * num_others + k];
      if (e >= 0 && e < window->num_experts) take(static_cast<int>(e), num_others + 1);
    }
  }
  // probs = the mean of what fill(expert, probs) gives for each expert chosen there.
  // False where the routing is not known.
  template <typename Fill>
  bool MeanOverChosen(Place place, float* probs, const Fill& fill) const {
    if (place.back < 0 || At(place.back, place.layer) < 0) return false;
    if (num_others == 0) {
      fill(At(place.back, place.layer), probs);
      return true;
    }
    const auto experts_count = static_cast<size_t>(window->num_experts);
    std::vector<float> one(experts_count);
    std::fill_n(probs, experts_count, 0.f);
    int told = 0;
    EachChosen(place, [&](int expert, int) {
      fill(expert, one.data());
      for (size_t i = 0; i < experts_count; ++i) probs[i] += one[i];
      ++told;
    });
    for (size_t i = 0; i < experts_count; ++i) probs[i] /= static_cast<float>(told);
    return true;
  }
};

class CountingPredictor : public ExpertPredictor {
 public:
  CountingPredictor(std::string name, int history,
                    std::shared_ptr<const BaselineTables> tables)
      : tables_(std::move(tables)), name_(std::move(name)), history_(history) {}
  std::string name() const override { return name_; }
  bool needs_hidden() const override { return false; }
  int history_tokens() const override { return history_; }
  std::optional<at::Tensor> Predict(const RoutingWindow& window, int lead) override;

 protected:
  // False where this predictor never speaks for such a target.
  virtual bool Speaks(const RoutingWindow& window) const { return true; }
  virtual void Row(const TokenView& token, Target target, int lead,
                   float* probs) const = 0;
  int Global(const TokenView& token, Target target) const {
    return tables_->geometry().GlobalLayer(token.window->stack, target.layer);
  }
  // The chain's newest layer, global: where the newest known choice was made.
  int NewestLayer(const TokenView& token) const {
    const RoutingWindow& w = *token.window;
    const int layer = w.source_layer >= 0 ? w.source_layer : w.num_layers - 1;
    return tables_->geometry().GlobalLayer(w.stack, layer);
  }
  std::shared_ptr<const BaselineTables> tables_;

 private:
  std::string name_;
  int history_;
};

std::optional<at::Tensor> CountingPredictor::Predict(const RoutingWindow& window,
                                                     int lead) {
  const auto target = TargetOf(window, lead);
  const MoeGeometry& g = tables_->geometry();
  if (window.num_experts != g.num_experts ||
      window.num_layers != g.layers(window.stack)) {
    throw std::logic_error("a window of another model than the baselines'");
  }
  if (!target || !Speaks(window)) return std::nullopt;
  const auto ids = window.token_ids_BT.to(at::kCPU).contiguous();
  const auto experts = window.experts_BTL.to(at::kCPU).contiguous();
  const int64_t B = ids.size(0), T = ids.size(1), L = window.num_layers;
  at::Tensor variance;
  if (window.hidden_BTD.defined() && needs_hidden()) {
    variance = window.hidden_BTD.to(at::kCPU).var(-1, false).contiguous();
  }
  at::Tensor others;
  if (window.others_BTLK.defined()) {
    others = window.others_BTLK.to(at::kCPU).contiguous();
  }
  const int64_t K = others.defined() ? others.size(3) : 0;
  auto probs = at::empty({B, T, g.num_experts});
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t t = 0; t < T; ++t) {
      const int64_t row = b * T + t;
      const TokenView token{&window,
                            experts.data_ptr<int64_t>() + b * T * L,
                            ids.data_ptr<int64_t>()[row],
                            static_cast<int>(t),
                            variance.defined() ? variance.data_ptr<float>()[row] : NAN,
                            K > 0 ? others.data_ptr<int64_t>() + b * T * L * K : nullptr,
                            static_cast<int>(K)};
      Row(token, *target, lead, probs.data_ptr<float>() + row * g.num_experts);
    }
  }
  return probs;
}

class FrequencyPredictor final : public CountingPredictor {
 public:
  using CountingPredictor::CountingPredictor;

 private:
  void Row(const TokenView& token, Target target, int, float* probs) const override {
    tables_->Frequency(Global(token, target), probs);
  }
};

// The next token's id is not known: its layers get their frequency.
class TokenTablePredictor final : public CountingPredictor {
 public:
  using CountingPredictor::CountingPredictor;
  bool needs_token_ids() const override { return true; }

 private:
  void Row(const TokenView& token, Target target, int, float* probs) const override {
    tables_->Token(Global(token, target), target.next_token ? -1 : token.token_id, probs);
  }
};

// order 2 where two layers are known; else order 1; else frequency.
class MarkovPredictor final : public CountingPredictor {
 public:
  MarkovPredictor(std::string name, int order,
                  std::shared_ptr<const BaselineTables> tables)
      : CountingPredictor(std::move(name), 3, std::move(tables)), order_(order) {}

 private:
  void Row(const TokenView& token, Target target, int lead, float* probs) const override {
    const int layer = Global(token, target);
    const int source = NewestLayer(token), before = token.Newest(1);
    const bool second = order_ == 2 && before >= 0;
    const auto fill = [&](int expert, float* row) {
      if (second) return tables_->Markov2(source, lead, layer, before, expert, row);
      tables_->Markov1(source, lead, layer, expert, row);
    };
    if (!token.MeanOverChosen(token.NewestPlace(0), probs, fill)) {
      tables_->Frequency(layer, probs);
    }
  }
  int order_;
};

// The token before, at the same layer: in the encoder it is routed at the same time.
class PreviousTokenPredictor final : public CountingPredictor {
 public:
  using CountingPredictor::CountingPredictor;

 private:
  bool Speaks(const RoutingWindow& window) const override {
    return window.stack == Stack::kDecoder;
  }
  void Row(const TokenView& token, Target target, int, float* probs) const override {
    const int layer = Global(token, target);
    const auto fill = [&](int expert, float* row) {
      tables_->PreviousToken(layer, expert, row);
    };
    if (!token.MeanOverChosen({target.next_token ? 0 : 1, target.layer}, probs, fill)) {
      tables_->Frequency(layer, probs);
    }
  }
};

// The newest `depth` choices carried on as if ids meant the same in every layer, which
// they do not: the original system's heuristics, kept as controls. Of K choices each has
// an equal part.
void Carry(const TokenView& token, int depth, int experts, float* probs) {
  double known = 0;
  for (int i = 0; i < depth; ++i) known += token.Newest(i) >= 0 ? kLayerWeights[i] : 0;
  std::fill_n(probs, experts,
              static_cast<float>((known > 0 ? 1 - kCarried : 1) / experts));
  for (int i = 0; i < depth; ++i) {
    const double carried = kCarried * kLayerWeights[i] / known;
    token.EachChosen(token.NewestPlace(i), [&](int expert, int count) {
      probs[expert] += static_cast<float>(carried / count);
    });
  }
}

class CarryPredictor final : public CountingPredictor {
 public:
  CarryPredictor(std::string name, int depth,
                 std::shared_ptr<const BaselineTables> tables)
      : CountingPredictor(std::move(name), 1 + depth, std::move(tables)), depth_(depth) {}

 private:
  void Row(const TokenView& token, Target, int, float* probs) const override {
    Carry(token, depth_, tables_->geometry().num_experts, probs);
  }
  int depth_;
};

// multi_layer and pattern mixed: repetitive input (state variance below .1) trusts the
// pattern, diverse input (above .5) the layers; each weighted by its confidence, which is
// min(1, count / 1000) for the pattern. Without states the input is neither.
class AdaptivePredictor final : public CountingPredictor {
 public:
  using CountingPredictor::CountingPredictor;
  bool needs_hidden() const override { return true; }

 private:
  static constexpr double kCarryConfidence = 0.85;  // .7 x 1 (one id) + .3 x .5 (start)
  void Row(const TokenView& token, Target target, int lead, float* probs) const override {
    const int E = tables_->geometry().num_experts;
    Carry(token, 4, E, probs);
    const int newest = token.Newest(0);
    if (newest < 0) return;
    const double v = token.state_variance;
    const double share = v < 0.1 ? 0.3 : v > 0.5 ? 0.7 : 0.5;
    const int source = NewestLayer(token);
    std::vector<float> pattern(E);
    tables_->Markov1(source, lead, Global(token, target), newest, pattern.data());
    const double carry = share * kCarryConfidence;
    const double count = tables_->Markov1Count(source, lead, newest);
    const double learnt = (1 - share) * std::min(1.0, count / 1000);
    for (int e = 0; e < E; ++e) {
      probs[e] =
          static_cast<float>((carry * probs[e] + learnt * pattern[e]) / (carry + learnt));
    }
  }
};

}  // namespace

StaleGatePredictor::StaleGatePredictor(MoeGeometry geometry,
                                       std::vector<RouterWeights> routers)
    : geometry_(geometry), routers_(std::move(routers)) {
  if (static_cast<int>(routers_.size()) != geometry_.num_layers()) {
    throw UsageError(ErrorText("stale_gate needs a router for each MoE layer",
                               std::to_string(routers_.size()) + " routers, " +
                                   std::to_string(geometry_.num_layers()) + " layers",
                               "name the store or the model that holds them"));
  }
}

at::Tensor StaleGatePredictor::Apply(const RoutingWindow& window, int target) const {
  const RouterWeights& from =
      routers_[geometry_.GlobalLayer(window.stack, window.source_layer)];
  const RouterWeights& to = routers_[geometry_.GlobalLayer(window.stack, target)];
  auto x = window.hidden_BTD;
  if (window.source_layer != target) {
    // A channel that the source's gain removed cannot come back.
    const auto gone = from.norm_gain_D.abs().lt(1e-12);
    const auto ratio =
        (to.norm_gain_D / from.norm_gain_D.masked_fill(gone, 1)).masked_fill(gone, 0);
    x = x * ratio;
  }
  const auto logits = at::linear(
      x, to.weight_ED,
      to.bias_E.defined() ? std::optional<at::Tensor>(to.bias_E) : std::nullopt);
  return at::softmax(logits, -1);
}

std::optional<at::Tensor> StaleGatePredictor::Predict(const RoutingWindow& window,
                                                      int lead) {
  const auto target = TargetOf(window, lead);
  if (!target || target->next_token || window.source_layer < 0 ||
      !window.hidden_BTD.defined()) {
    return std::nullopt;
  }
  return Apply(window, target->layer);
}

at::Tensor StaleGatePredictor::PredictLead0(const RoutingWindow& window) const {
  if (window.source_layer < 0 || !window.hidden_BTD.defined()) {
    throw std::logic_error("lead 0 needs the router's input at the source layer");
  }
  return Apply(window, window.source_layer);
}

std::vector<std::string> BaselineNames() {
  return {"frequency",   "token_table", "markov",   "previous_token", "layer_minus_1",
          "multi_layer", "pattern",     "adaptive", "stale_gate"};
}

std::unique_ptr<ExpertPredictor> MakeBaseline(
    const std::string& name, std::shared_ptr<const BaselineTables> tables,
    const MoeGeometry& geometry, const std::vector<RouterWeights>& routers) {
  ParseChoice("--predictor", name, BaselineNames());
  if (name == "stale_gate") {
    return std::make_unique<StaleGatePredictor>(geometry, routers);
  }
  if (!tables) {
    throw UsageError(ErrorText("the predictor " + name + " needs counts of a store", "",
                               "name the baselines.safetensors of a trained run"));
  }
  if (name == "frequency") {
    return std::make_unique<FrequencyPredictor>(name, 1, tables);
  }
  if (name == "token_table") {
    return std::make_unique<TokenTablePredictor>(name, 1, tables);
  }
  if (name == "previous_token") {
    return std::make_unique<PreviousTokenPredictor>(name, 2, tables);
  }
  if (name == "layer_minus_1") return std::make_unique<CarryPredictor>(name, 1, tables);
  if (name == "multi_layer") return std::make_unique<CarryPredictor>(name, 4, tables);
  if (name == "adaptive") return std::make_unique<AdaptivePredictor>(name, 5, tables);
  return std::make_unique<MarkovPredictor>(name, name == "markov" ? 2 : 1, tables);
}

}  // namespace routecast
