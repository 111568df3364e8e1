// Context of expert ids alone: the published inter-layer model with a padding id, a slot
// mask, embeddings of stack, source layer and lead, and all leads in one pass. `moe` has
// experts in place of the feed-forward layers of its second and fourth encoder layer.
#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "models/baseline_predictors.h"
#include "models/expert_mixture.h"
#include "models/trunk_model.h"

namespace routecast {
namespace {

constexpr int kPublishedSlots = 12, kPatterns = 64;
// The published 0.02 drowns in the positions, whose sines and cosines are of the order
// of 1: it takes hundreds of steps until an expert's id is seen at all.
constexpr double kExpertStd = 1;
constexpr double kBalanceWeight = 0.01;

// An encoder layer whose feed-forward part is a mixture of experts.
struct MixtureLayer {
  MixtureLayer(ParameterMaker* make, const std::string& name, const SpeculationConfig& c)
      : attention(make, name, c.width, c.heads),
        experts(make, name + ".experts", c.width, c.ff),
        out_norm(make, name + ".out_norm", c.width) {}
  AttentionBlock attention;
  ExpertMixture experts;
  NormLayer out_norm;
};

struct InterlayerNet {
  InterlayerNet(const SpeculationConfig& c, ParameterMaker* make);
  EmbeddingLayer expert;               // E + 1 rows; the last one is padding
  EmbeddingLayer slot;                 // own layers, then the previous token's
  EmbeddingLayer stack, source, lead;  // ours: the model knows what it predicts
  std::vector<EncoderLayer> layers;    // all, or of `moe` every other one
  std::vector<MixtureLayer> mixtures;  // of `moe`, the others
  AttentionLayer context, pattern;
  at::Tensor memory;  // [kPatterns,D]
  NormLayer norm;
  LinearLayer head_in, head_mid, head_out, confidence_in, confidence_out;
  // Ours, where priors are wanted: log-probabilities counted in the train part, from the
  // expert at the source layer, and their learnt gain by source layer.
  at::Tensor markov;       // constant, [layers * (E + 1),leads * E]; zeros if unknown
  at::Tensor markov_gain;  // [layers]
};

int MostLayers(const MoeGeometry& g) {
  return std::max(g.encoder_layers, g.decoder_layers);
}

InterlayerNet::InterlayerNet(const SpeculationConfig& c, ParameterMaker* make)
    : expert(make, "expert.embedding", c.geometry.num_experts + 1, c.width, kExpertStd),
      slot(make, "slot.embedding", std::max(kPublishedSlots, 2 * c.context), c.width,
           0.02),
      stack(make, "stack.embedding", 2, c.width, 0.02),
      source(make, "source.embedding", MostLayers(c.geometry) + 1, c.width, 0.02),
      lead(make, "lead.embedding", MostLayers(c.geometry), c.width, 0.02),
      context(make, "context", c.width, c.heads),
      pattern(make, "pattern", c.width, c.heads),
      memory(make->Normal("pattern.memory", {kPatterns, c.width}, 1)),
      norm(make, "norm", c.width),
      head_in(make, "head.in", c.width, c.ff),
      head_mid(make, "head.mid", c.ff, c.ff / 2),
      head_out(make, "head.out", c.ff / 2, c.geometry.num_experts),
      confidence_in(make, "confidence.in", c.width, c.width / 2),
      confidence_out(make, "confidence.out", c.width / 2, 1) {
  for (int i = 0; i < c.layers; ++i) {
    const std::string name = "layer." + std::to_string(i);
    if (c.kind == "moe" && i % 2 == 1) {
      mixtures.emplace_back(make, name, c);
    } else {
      layers.emplace_back(make, name, c.width, c.heads, c.ff);
    }
  }
}

class InterlayerModel final : public TrunkModel {
 public:
  InterlayerModel(const SpeculationConfig& config, const std::vector<uint64_t>& seeds)
      : TrunkModel(config, static_cast<int64_t>(seeds.size())),
        make_(&parameters_, seeds),
        net_(config, &make_) {
    if (config.priors) AddPriors();
  }
  void FitPriors(const BaselineTables& tables) override;

 protected:
  SpeculationOutput Compute(const RoutingWindow& window, KeyedDropout* dropout) override;

 private:
  void AddPriors();
  at::Tensor PriorLogits(const RoutingWindow& window, int64_t leads) const;
  at::Tensor Embed(const ExpertSlots& slots, const RoutingWindow& window) const;
  at::Tensor Pool(const at::Tensor& x_BND, const ExpertSlots& slots) const;

  ParameterMaker make_;
  InterlayerNet net_;
};

void InterlayerModel::AddPriors() {
  const MoeGeometry& g = config_.geometry;
  const int64_t rows = int64_t{g.num_layers()} * (g.num_experts + 1);
  net_.markov = at::zeros({rows, net_.lead.rows() * g.num_experts});
  constants_.Add("prior.markov", net_.markov);
  net_.markov_gain = make_.Constant("prior.gain", {g.num_layers()}, 1);
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
  const int64_t E = config_.geometry.num_experts, M = members();
  const int layer = config_.geometry.GlobalLayer(window.stack, window.source_layer);
  const auto rows = window.experts_BTL.select(2, window.source_layer) + layer * (E + 1);
  const auto logits = at::embedding(net_.markov, rows).narrow(2, 0, leads * E);
  const auto gain = net_.markov_gain.select(-1, layer);
  return (logits.reshape({M, -1, leads * E}) * gain.view({M, 1, 1}))
      .view({rows.size(0), rows.size(1), leads, E});
}

at::Tensor InterlayerModel::Embed(const ExpertSlots& slots,
                                  const RoutingWindow& window) const {
  const int64_t B = slots.ids_BTR.size(0), T = slots.ids_BTR.size(1);
  const int64_t R = slots.ids_BTR.size(2), W = config_.context;
  auto slot = net_.slot.Rows(0, W);
  if (R > W) slot = at::cat({net_.slot.Rows(W, W), slot}, slot.dim() - 2);
  auto x = AddRows(net_.expert(slots.ids_BTR), slot);
  x = AddRow(x, net_.stack.Row(static_cast<int64_t>(window.stack)));
  x = AddRow(x, net_.source.Row(window.source_layer + 1));
  x = x.view({B, T * R, config_.width});
  return x + Sinusoid(T * R, config_.width, x.options().requires_grad(false));
}

// One vector a token: attention over its own rows, then over the pattern memory.
at::Tensor InterlayerModel::Pool(const at::Tensor& x_BND,
                                 const ExpertSlots& slots) const {
  const int64_t B = slots.ids_BTR.size(0), T = slots.ids_BTR.size(1);
  const int64_t R = slots.ids_BTR.size(2), D = config_.width, M = members();
  const auto rows = x_BND.view({B * T, R, D});
  const auto weight = slots.valid_BTR.view({B * T, R, 1}).to(at::kFloat);
  const auto query =
      (rows * weight).sum(1, true) / weight.sum(1, true).clamp_min(1);  // [B*T,1,D]
  const auto mask = AdditiveMask(slots.valid_BTR.view({B * T, 1, 1, R}));
  const auto c = net_.context(query, rows, mask).view({M, B / M * T, D});
  const auto m = net_.pattern(c, net_.memory.view({M, kPatterns, D}), {});
  return net_.norm(c + m).view({B, T, D});
}

SpeculationOutput InterlayerModel::Compute(const RoutingWindow& window,
                                           KeyedDropout* dropout) {
  const int64_t H = NumLeads(window.stack, window.source_layer);
  const ExpertSlots slots = SlotsOf(window, config_.context);
  const auto mask = SlotMask(slots, window.stack);
  auto x = Embed(slots, window);
  at::Tensor balance;
  for (int i = 0; i < config_.layers; ++i) {
    if (net_.mixtures.empty() || i % 2 == 0) {
      x = net_.layers[static_cast<size_t>(net_.mixtures.empty() ? i : i / 2)](x, mask,
                                                                              dropout);
      continue;
    }
    const MixtureLayer& layer = net_.mixtures[static_cast<size_t>(i / 2)];
    const auto y = layer.attention(x, mask, dropout);
    const auto mixed = layer.experts(y, slots.valid_BTR.flatten(1, 2), dropout);
    x = layer.out_norm(y + (*dropout)(mixed.rows));
    balance = balance.defined() ? balance + mixed.balance : mixed.balance;
  }
  const auto h = AddRows((*dropout)(Pool(x, slots)).unsqueeze(2).expand({-1, -1, H, -1}),
                         net_.lead.Rows(0, H));
  const auto hidden =
      (*dropout)(at::gelu(net_.head_mid((*dropout)(at::gelu(net_.head_in(h))))));
  const auto confidence = net_.confidence_out(at::gelu(net_.confidence_in(h)));
  SpeculationOutput out;
  out.logits_BTHE = net_.head_out(hidden);
  if (net_.markov.defined() && window.source_layer >= 0) {
    out.logits_BTHE = out.logits_BTHE + PriorLogits(window, H);
  }
  out.confidence_BTH = at::sigmoid(confidence).squeeze(3);
  if (balance.defined()) {
    const auto tokens = window.valid_BT.view({members(), -1}).sum(1).to(at::kFloat);
    out.own_loss = balance * tokens * kBalanceWeight;
  }
  return out;
}

}  // namespace

std::unique_ptr<SpeculationModel> MakeInterlayer(const SpeculationConfig& config,
                                                 const std::vector<uint64_t>& seeds) {
  return std::make_unique<InterlayerModel>(config, seeds);
}

}  // namespace routecast
