#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "models/baseline_predictors.h"
#include "models/speculation_kinds.h"
#include "models/speculation_layers.h"

namespace routecast {
namespace {

constexpr int kPublishedSlots = 12, kPatterns = 64, kHistory = 64;
// The published 0.02 drowns in the positions, whose sines and cosines are of the order
// of 1: it takes hundreds of steps until an expert's id is seen at all.
constexpr double kExpertStd = 1;

struct EncoderLayer {
  EncoderLayer(ParameterMaker* make, const std::string& name, const SpeculationConfig& c)
      : attention(make, name + ".attention", c.width, c.heads),
        attention_norm(make, name + ".attention_norm", c.width),
        in(make, name + ".in", c.width, c.ff),
        out(make, name + ".out", c.ff, c.width),
        out_norm(make, name + ".out_norm", c.width) {}
  at::Tensor operator()(const at::Tensor& x, const at::Tensor& mask,
                        KeyedDropout* dropout) const {
    const auto y = attention_norm(x + (*dropout)(attention(x, x, mask)));
    return out_norm(y + (*dropout)(out((*dropout)(at::gelu(in(y))))));
  }
  AttentionLayer attention;
  NormLayer attention_norm;
  LinearLayer in, out;
  NormLayer out_norm;
};

struct InterlayerNet {
  InterlayerNet(const SpeculationConfig& c, ParameterMaker make);
  at::Tensor expert;               // [E + 1,D]; the last row is padding
  at::Tensor slot;                 // own layers, then the previous token's
  at::Tensor stack, source, lead;  // ours: the model knows what it predicts
  std::vector<EncoderLayer> layers;
  AttentionLayer context, pattern;
  at::Tensor memory;  // [kPatterns,D]
  NormLayer norm;
  LinearLayer head_in, head_mid, head_out, confidence_in, confidence_out;
  // Ours, where priors are wanted: log-probabilities counted in the train part, from the
  // expert at the source layer, and their learnt gain by source layer.
  at::Tensor markov;       // constant, [layers * (E + 1),leads * E]; zeros if unknown
  at::Tensor markov_gain;  // [layers]
};

InterlayerNet::InterlayerNet(const SpeculationConfig& c, ParameterMaker make)
    : expert(make.Normal("expert.embedding", {c.geometry.num_experts + 1, c.width},
                         kExpertStd)),
      slot(make.Normal("slot.embedding",
                       {std::max(kPublishedSlots, 2 * c.context), c.width}, 0.02)),
      stack(make.Normal("stack.embedding", {2, c.width}, 0.02)),
      source(make.Normal(
          "source.embedding",
          {std::max(c.geometry.encoder_layers, c.geometry.decoder_layers) + 1, c.width},
          0.02)),
      lead(make.Normal(
          "lead.embedding",
          {std::max(c.geometry.encoder_layers, c.geometry.decoder_layers), c.width},
          0.02)),
      context(&make, "context", c.width, c.heads),
      pattern(&make, "pattern", c.width, c.heads),
      memory(make.Normal("pattern.memory", {kPatterns, c.width}, 1)),
      norm(&make, "norm", c.width),
      head_in(&make, "head.in", c.width, c.ff),
      head_mid(&make, "head.mid", c.ff, c.ff / 2),
      head_out(&make, "head.out", c.ff / 2, c.geometry.num_experts),
      confidence_in(&make, "confidence.in", c.width, c.width / 2),
      confidence_out(&make, "confidence.out", c.width / 2, 1) {
  for (int i = 0; i < c.layers; ++i) {
    layers.emplace_back(&make, "layer." + std::to_string(i), c);
  }
}

// What a token may look at: R rows, oldest first.
struct Slots {
  at::Tensor ids_BTR;    // E = padding
  at::Tensor valid_BTR;  // bool
};

// Additive mask of a bool tensor (true = may attend).
at::Tensor Additive(const at::Tensor& may_attend) {
  return at::zeros(may_attend.sizes(), may_attend.options().dtype(at::kFloat))
      .masked_fill(may_attend.logical_not(), kMasked);
}

// Fixed sinusoid of rows 0..rows-1: sin at even columns, cos at odd ones.
at::Tensor Sinusoid(int64_t rows, int64_t width, const at::TensorOptions& options) {
  const auto even = at::arange(0, width, 2, options);
  const auto angle = at::arange(rows, options).unsqueeze(1) *
                     at::exp(even * (-std::log(10000.0) / static_cast<double>(width)));
  return at::stack({angle.sin(), angle.cos()}, 2).view({rows, -1}).narrow(1, 0, width);
}

class InterlayerModel final : public SpeculationModel {
 public:
  InterlayerModel(const SpeculationConfig& config, uint64_t seed)
      : SpeculationModel(config), net_(config, ParameterMaker(&parameters_, seed)) {
    if (config.priors) AddPriors();
  }
  int history_tokens() const override { return kHistory; }
  void FitPriors(const BaselineTables& tables) override;
  SpeculationOutput Forward(const RoutingWindow& window, uint64_t dropout_key) override;

 private:
  void AddPriors();
  at::Tensor PriorLogits(const RoutingWindow& window, int64_t leads) const;
  at::Tensor LastLayers(const at::Tensor& ids_BTL, int64_t known) const;
  Slots SlotsOf(const RoutingWindow& window) const;
  at::Tensor Embed(const Slots& slots, const RoutingWindow& window) const;
  at::Tensor Mask(const Slots& slots, Stack stack) const;
  at::Tensor Pool(const at::Tensor& x_BND, const Slots& slots) const;

  InterlayerNet net_;
};

void InterlayerModel::AddPriors() {
  const MoeGeometry& g = config_.geometry;
  const int64_t rows = int64_t{g.num_layers()} * (g.num_experts + 1);
  net_.markov = at::zeros({rows, net_.lead.size(0) * g.num_experts});
  net_.markov_gain = at::ones({g.num_layers()}).requires_grad_();
  constants_.Add("prior.markov", net_.markov);
  parameters_.Add("prior.gain", net_.markov_gain);
}

void InterlayerModel::FitPriors(const BaselineTables& tables) {
  if (!net_.markov.defined()) return;
  const MoeGeometry& g = config_.geometry;
  at::Tensor log_probs = at::zeros_like(net_.markov);
  std::vector<float> probs(static_cast<size_t>(g.num_experts));
  for (int layer = 0; layer < g.num_layers(); ++layer) {
    const Stack stack = g.StackOf(layer);
    const int source = g.LayerInStack(layer), leads = NumLeads(stack, source);
    for (int expert = 0; expert < g.num_experts; ++expert) {
      float* row = log_probs.data_ptr<float>() +
                   (int64_t{layer} * (g.num_experts + 1) + expert) * log_probs.size(1);
      for (int lead = 1; lead <= leads; ++lead) {
        const int target = g.GlobalLayer(stack, (source + lead) % g.layers(stack));
        tables.Markov1(layer, lead, target, expert, probs.data());
        for (float p : probs) *row++ = std::log(p);
      }
    }
  }
  net_.markov.copy_(log_probs);
}

// [B,T,leads,E]
at::Tensor InterlayerModel::PriorLogits(const RoutingWindow& window,
                                        int64_t leads) const {
  const int64_t E = config_.geometry.num_experts;
  const int layer = config_.geometry.GlobalLayer(window.stack, window.source_layer);
  const auto rows = window.experts_BTL.select(2, window.source_layer) + layer * (E + 1);
  return at::embedding(net_.markov, rows)
             .narrow(2, 0, leads * E)
             .view({rows.size(0), rows.size(1), leads, E}) *
         net_.markov_gain[layer];
}

// The newest W of the first `known` columns, right-aligned, padded with E on the left.
at::Tensor InterlayerModel::LastLayers(const at::Tensor& ids_BTL, int64_t known) const {
  const auto padding = at::full({ids_BTL.size(0), ids_BTL.size(1), config_.context},
                                config_.geometry.num_experts, ids_BTL.options());
  return at::cat({padding, ids_BTL.narrow(2, 0, known)}, 2)
      .narrow(2, known, config_.context);
}

// Encoder: the token's own W rows. Decoder: the previous token's last W rows before them,
// so that every row of token t holds only what is known at (t, source layer), and a mask
// over tokens suffices for causality.
Slots InterlayerModel::SlotsOf(const RoutingWindow& window) const {
  const int64_t unknown = config_.geometry.num_experts;
  auto ids = LastLayers(window.experts_BTL, window.source_layer + 1);
  auto valid = ids.ne(unknown);
  // The newest slot always counts: before the first layer its padding id says just that.
  valid.select(2, config_.context - 1).fill_(true);
  if (window.stack == Stack::kDecoder) {
    const auto all = LastLayers(window.experts_BTL, window.experts_BTL.size(2));
    const auto before = at::cat(
        {at::full_like(all.narrow(1, 0, 1), unknown), all.narrow(1, 0, all.size(1) - 1)},
        1);
    ids = at::cat({before, ids}, 2);
    valid = at::cat({before.ne(unknown), valid}, 2);
  }
  return {ids, valid.logical_and(window.valid_BT.unsqueeze(2))};
}

at::Tensor InterlayerModel::Embed(const Slots& slots, const RoutingWindow& window) const {
  const int64_t B = slots.ids_BTR.size(0), T = slots.ids_BTR.size(1);
  const int64_t R = slots.ids_BTR.size(2), W = config_.context;
  auto slot = net_.slot.narrow(0, 0, W);
  if (R > W) slot = at::cat({net_.slot.narrow(0, W, W), slot});
  auto x = at::embedding(net_.expert, slots.ids_BTR) + slot +
           net_.stack.select(0, static_cast<int64_t>(window.stack)) +
           net_.source.select(0, window.source_layer + 1);
  x = x.view({B, T * R, config_.width});
  return x + Sinusoid(T * R, config_.width, x.options().requires_grad(false));
}

at::Tensor InterlayerModel::Mask(const Slots& slots, Stack stack) const {
  const int64_t B = slots.ids_BTR.size(0), T = slots.ids_BTR.size(1);
  const int64_t R = slots.ids_BTR.size(2);
  auto may = slots.valid_BTR.view({B, 1, 1, T * R});
  if (stack == Stack::kDecoder) {
    const auto token = at::arange(T * R, slots.ids_BTR.options()).floor_divide(R);
    may = may.logical_and(token.unsqueeze(0).le(token.unsqueeze(1)));
  }
  return Additive(may);
}

// One vector a token: attention over its own rows, then over the pattern memory.
at::Tensor InterlayerModel::Pool(const at::Tensor& x_BND, const Slots& slots) const {
  const int64_t B = slots.ids_BTR.size(0), T = slots.ids_BTR.size(1);
  const int64_t R = slots.ids_BTR.size(2), D = config_.width;
  const auto rows = x_BND.view({B * T, R, D});
  const auto weight = slots.valid_BTR.view({B * T, R, 1}).to(at::kFloat);
  const auto query =
      (rows * weight).sum(1, true) / weight.sum(1, true).clamp_min(1);  // [B*T,1,D]
  const auto mask = Additive(slots.valid_BTR.view({B * T, 1, 1, R}));
  const auto c = net_.context(query, rows, mask).view({1, B * T, D});
  const auto m = net_.pattern(c, net_.memory.unsqueeze(0), {});
  return net_.norm(c + m).view({B, T, D});
}

SpeculationOutput InterlayerModel::Forward(const RoutingWindow& window,
                                           uint64_t dropout_key) {
  const int64_t B = window.token_ids_BT.size(0), T = window.token_ids_BT.size(1);
  const int64_t H = NumLeads(window.stack, window.source_layer);
  if (H == 0 || B * T == 0) {
    const auto options = net_.expert.options().requires_grad(false);
    return {at::zeros({B, T, H, config_.geometry.num_experts}, options),
            at::zeros({B, T, H}, options),
            {}};
  }
  KeyedDropout dropout(config_.dropout, dropout_key);
  const Slots slots = SlotsOf(window);
  const auto mask = Mask(slots, window.stack);
  auto x = Embed(slots, window);
  for (const EncoderLayer& layer : net_.layers) x = layer(x, mask, &dropout);
  const auto h = dropout(Pool(x, slots)).unsqueeze(2) + net_.lead.narrow(0, 0, H);
  const auto hidden =
      dropout(at::gelu(net_.head_mid(dropout(at::gelu(net_.head_in(h))))));
  const auto confidence = net_.confidence_out(at::gelu(net_.confidence_in(h)));
  auto logits = net_.head_out(hidden);
  if (net_.markov.defined() && window.source_layer >= 0) {
    logits = logits + PriorLogits(window, H);
  }
  return {logits, at::sigmoid(confidence).squeeze(3), {}};
}

}  // namespace

std::unique_ptr<SpeculationModel> MakeInterlayerModel(const SpeculationConfig& config,
                                                      uint64_t seed) {
  return std::make_unique<InterlayerModel>(config, seed);
}

}  // namespace routecast
