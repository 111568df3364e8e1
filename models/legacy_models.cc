// The small kinds of the original system: the router's input and the newest layer's
// expert of the same token -> experts. Published shapes (width 128, inner 256 for
// `simple`); ours: the source layer and the token's id are seen, and every target layer
// has its own output.
#include <ATen/ATen.h>

#include <vector>

#include "models/trunk_model.h"

namespace routecast {
namespace {

// One vector a token, and how it is made.
class LegacyModel : public TrunkModel {
 protected:
  LegacyModel(const SpeculationConfig& c, const ModelSeeds& seeds)
      : TrunkModel(c, static_cast<int64_t>(seeds.size())), make_(&parameters_, seeds) {}
  // REQUIRED once by the constructor, after the layers, so that what is published has the
  // streams of a model without our additions.
  void AddHead(int64_t in, int64_t width) {
    features_.emplace_back(&make_, config_, in);
    head_.emplace_back(&make_, "head", config_.geometry, width);
  }
  virtual at::Tensor Trunk(const at::Tensor& state, const at::Tensor& gates,
                           const RoutingWindow& window, KeyedDropout* dropout,
                           TokenMemory* past) = 0;
  // What the trunk's input gets of the source layer and the token.
  at::Tensor AddSource(const at::Tensor& x, const RoutingWindow& window) const {
    return features_[0].Add(x, window);
  }
  SpeculationOutput Compute(const RoutingWindow& window, KeyedDropout* dropout,
                            TokenMemory* past) override {
    const auto gates = NewestGates(window, config_, 1).squeeze(2);
    const auto h = Trunk(features_[0].State(window), gates, window, dropout, past);
    SpeculationOutput out;
    out.logits_BTHE = head_[0](h, window);
    out.confidence_BTH = LargestProbability(out.logits_BTHE);
    return out;
  }
  int64_t S() const { return config_.hidden_width; }
  int64_t E() const { return config_.geometry.num_experts; }
  ParameterMaker make_;

 private:
  std::vector<SourceFeatures> features_;
  std::vector<TargetHead> head_;
};

// Both inputs side by side -> one hidden layer.
class SimpleModel final : public LegacyModel {
 public:
  SimpleModel(const SpeculationConfig& c, const ModelSeeds& seeds)
      : LegacyModel(c, seeds), in_(&make_, "in", S() + E(), c.width) {
    AddHead(c.width, c.width);
  }

 protected:
  at::Tensor Trunk(const at::Tensor& state, const at::Tensor& gates,
                   const RoutingWindow& window, KeyedDropout* dropout,
                   TokenMemory*) override {
    const auto x = AddSource(in_(at::cat({state, gates}, 2)), window);
    return (*dropout)(at::relu(x));
  }

 private:
  LinearLayer in_;
};

// The two inputs projected and added up: what `lstm` and `attention` start from.
struct SumInput {
  SumInput(ParameterMaker* make, int64_t hidden, int64_t experts, int64_t width)
      : state(make, "state", hidden, width), gates(make, "gates", experts, width) {}
  at::Tensor operator()(const at::Tensor& s, const at::Tensor& g) const {
    return state(s) + gates(g);
  }
  LinearLayer state, gates;
};

class AttentionModel final : public LegacyModel {
 public:
  AttentionModel(const SpeculationConfig& c, const ModelSeeds& seeds)
      : LegacyModel(c, seeds),
        in_(&make_, S(), E(), c.width),
        attention_(&make_, "attention", c.width, c.heads) {
    AddHead(c.width, c.width);
  }

 protected:
  at::Tensor Trunk(const at::Tensor& state, const at::Tensor& gates,
                   const RoutingWindow& window, KeyedDropout* dropout,
                   TokenMemory* past) override {
    const auto x = AddSource(in_(state, gates), window);
    return x + (*dropout)(attention_(x, x, TokenMask(window, past), past));
  }

 private:
  SumInput in_;
  AttentionLayer attention_;
};

class LstmModel final : public LegacyModel {
 public:
  LstmModel(const SpeculationConfig& c, const ModelSeeds& seeds)
      : LegacyModel(c, seeds), in_(&make_, S(), E(), c.width) {
    for (int i = 0; i < c.layers; ++i) {
      layers_.emplace_back(&make_, "lstm." + std::to_string(i), c.width, c.width);
    }
    AddHead(c.width, c.width);
  }

 protected:
  at::Tensor Trunk(const at::Tensor& state, const at::Tensor& gates,
                   const RoutingWindow& window, KeyedDropout* dropout,
                   TokenMemory* past) override {
    auto x = AddSource(in_(state, gates), window);
    for (const LstmLayer& layer : layers_) x = (*dropout)(layer(x, past));
    return x;
  }

 private:
  SumInput in_;
  std::vector<LstmLayer> layers_;
};

// Convolution over tokens with `taps` neighbours. Encoder: centred, padding counts as
// zeros; decoder: the token and those before it.
struct TokenConvolution {
  TokenConvolution(ParameterMaker* make, const std::string& name, int64_t in, int64_t out,
                   int taps)
      : linear(make, name, in * taps, out), taps(taps) {}
  at::Tensor operator()(const at::Tensor& x_BTI, const RoutingWindow& window,
                        TokenMemory* past) const {
    const auto own = x_BTI * window.valid_BT.unsqueeze(2).to(x_BTI.scalar_type());
    const auto x = WithKnown(own, 1, past);
    const int64_t T = own.size(1), known = KnownTokens(past);
    const int64_t left = window.stack == Stack::kEncoder ? taps / 2 : taps - 1;
    const auto padded =
        at::constant_pad_nd(x, {0, 0, left, taps - 1 - left}, 0);  // of dimension 1
    std::vector<at::Tensor> shifted;
    for (int i = 0; i < taps; ++i) shifted.push_back(padded.narrow(1, known + i, T));
    return linear(at::cat(shifted, 2));
  }
  LinearLayer linear;
  int taps;
};

class Conv1dModel final : public LegacyModel {
 public:
  Conv1dModel(const SpeculationConfig& c, const ModelSeeds& seeds)
      : LegacyModel(c, seeds), in_(&make_, "in", S() + E(), c.width) {
    for (const int taps : {1, 3, 5}) {
      convolutions_.emplace_back(&make_, "convolution." + std::to_string(taps), c.width,
                                 c.width / 2, taps);
    }
    mix_.emplace_back(&make_, "mix", 3 * (c.width / 2), c.ff);
    AddHead(c.width, c.ff);
  }

 protected:
  at::Tensor Trunk(const at::Tensor& state, const at::Tensor& gates,
                   const RoutingWindow& window, KeyedDropout* dropout,
                   TokenMemory* past) override {
    const auto x = at::relu(AddSource(in_(at::cat({state, gates}, 2)), window));
    std::vector<at::Tensor> views;
    for (const TokenConvolution& convolution : convolutions_) {
      views.push_back(at::relu(convolution(x, window, past)));
    }
    return at::relu(mix_[0]((*dropout)(at::cat(views, 2))));
  }

 private:
  LinearLayer in_;
  std::vector<TokenConvolution> convolutions_;
  std::vector<LinearLayer> mix_;
};

// The mean over the tokens around (encoder) or up to each (decoder), of at most `span`.
at::Tensor NearMean(const at::Tensor& x_BTI, const RoutingWindow& window, int span,
                    TokenMemory* past) {
  const auto weight = window.valid_BT.unsqueeze(2).to(x_BTI.scalar_type());
  const int64_t left = window.stack == Stack::kEncoder ? span / 2 : span - 1;
  const auto sum = [&](const at::Tensor& x) {
    const auto total =
        at::constant_pad_nd(WithKnown(x, 1, past), {0, 0, left, span - 1 - left}, 0)
            .slice(1, KnownTokens(past));
    at::Tensor all = total.narrow(1, 0, x.size(1));
    for (int i = 1; i < span; ++i) all = all + total.narrow(1, i, x.size(1));
    return all;
  };
  const auto values = sum(x_BTI * weight);  // before the weights': see TokenMemory
  return values / sum(weight).clamp_min(1);
}

class LegacyMultiscaleModel final : public LegacyModel {
 public:
  LegacyMultiscaleModel(const SpeculationConfig& c, const ModelSeeds& seeds)
      : LegacyModel(c, seeds),
        token_(&make_, "token", S() + E(), c.width),
        near_(&make_, "near", S() + E(), c.width),
        all_(&make_, "all", S() + E(), c.width),
        mix_(&make_, "mix", int64_t{3} * c.width, c.width) {
    AddHead(c.width, c.width);
  }

 protected:
  at::Tensor Trunk(const at::Tensor& state, const at::Tensor& gates,
                   const RoutingWindow& window, KeyedDropout* dropout,
                   TokenMemory* past) override {
    const auto x = at::cat({state, gates}, 2);
    const auto all = SequenceMean(x, window, past).expand(x.sizes());
    const auto views =
        at::cat({at::relu(AddSource(token_(x), window)),
                 at::relu(near_(NearMean(x, window, 5, past))), at::relu(all_(all))},
                2);
    return at::relu(mix_((*dropout)(views)));
  }

 private:
  LinearLayer token_, near_, all_, mix_;
};

}  // namespace

std::unique_ptr<SpeculationModel> MakeLegacy(const SpeculationConfig& config,
                                             const ModelSeeds& seeds) {
  if (config.kind == "simple") return std::make_unique<SimpleModel>(config, seeds);
  if (config.kind == "lstm") return std::make_unique<LstmModel>(config, seeds);
  if (config.kind == "attention") return std::make_unique<AttentionModel>(config, seeds);
  if (config.kind == "conv1d") return std::make_unique<Conv1dModel>(config, seeds);
  return std::make_unique<LegacyMultiscaleModel>(config, seeds);
}

}  // namespace routecast
