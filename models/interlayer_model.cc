// Context of expert ids alone: the published inter-layer model with a padding id, a slot
// mask, embeddings of stack, source layer and lead, and all leads in one pass. `moe` has
// experts in place of the feed-forward layers of its second and fourth encoder layer.
#include <ATen/ATen.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "models/expert_embedding.h"
#include "models/expert_mixture.h"
#include "models/markov_prior.h"
#include "models/trunk_model.h"

namespace routecast {
namespace {

constexpr int kPatterns = 64;
constexpr double kBalanceWeight = 0.01;
constexpr double kLeastWeight = 1e-12;  // of a pattern: keeps the logarithm finite

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
  ExpertEmbedding embed;
  EmbeddingLayer lead;                 // ours: the model knows what it predicts
  std::vector<EncoderLayer> layers;    // all, or of `moe` every other one
  std::vector<MixtureLayer> mixtures;  // of `moe`, the others
  AttentionLayer context, pattern;
  at::Tensor memory;  // [kPatterns,D]
  NormLayer norm;
  LinearLayer head_in, head_mid, head_out, confidence_in, confidence_out;
  std::vector<LinearLayer> backups;  // of the router's further choices; one or none
};

int MostLayers(const MoeGeometry& g) {
  return std::max(g.encoder_layers, g.decoder_layers);
}

InterlayerNet::InterlayerNet(const SpeculationConfig& c, ParameterMaker* make)
    : embed(make, c),
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
  if (c.backup_experts > 0) {
    backups.emplace_back(make, "head.backup", c.ff / 2,
                         c.backup_experts * c.geometry.num_experts);
  }
}

class InterlayerModel final : public TrunkModel {
 public:
  InterlayerModel(const SpeculationConfig& config, const ModelSeeds& seeds)
      : TrunkModel(config, static_cast<int64_t>(seeds.size())),
        make_(&parameters_, seeds),
        net_(config, &make_) {
    if (config.priors) prior_.emplace(&make_, &constants_, config.geometry);
  }
  void FitPriors(const BaselineTables& tables) override {
    if (prior_) prior_->Fit(tables);
  }

 protected:
  SpeculationOutput Compute(const RoutingWindow& window, KeyedDropout* dropout,
                            TokenMemory* past) override;

 private:
  at::Tensor Pool(const at::Tensor& x_BND, const ExpertSlots& slots,
                  at::Tensor* pattern_entropy_BT) const;

  ParameterMaker make_;
  InterlayerNet net_;
  std::optional<MarkovPrior> prior_;  // ours
};

// One vector a token: attention over its own rows, then over the pattern memory, whose
// weights' entropy goes to `pattern_entropy_BT` where it is not null.
at::Tensor InterlayerModel::Pool(const at::Tensor& x_BND, const ExpertSlots& slots,
                                 at::Tensor* pattern_entropy_BT) const {
  const int64_t B = slots.ids_BTR.size(0), T = slots.ids_BTR.size(1);
  const int64_t R = slots.ids_BTR.size(2), D = config_.width, M = members();
  const auto rows = x_BND.view({B * T, R, D});
  const auto weight = slots.valid_BTR.view({B * T, R, 1}).to(at::kFloat);
  const auto query =
      (rows * weight).sum(1, true) / weight.sum(1, true).clamp_min(1);  // [B*T,1,D]
  const auto mask = AdditiveMask(slots.valid_BTR.view({B * T, 1, 1, R}));
  const auto c = net_.context(query, rows, mask).view({M, B / M * T, D});
  const auto patterns = net_.memory.view({M, kPatterns, D});
  const auto m = net_.pattern(c, patterns, {});
  if (pattern_entropy_BT != nullptr) {
    const auto weights = net_.pattern.Weights(c, patterns);
    *pattern_entropy_BT =
        -(weights * weights.clamp_min(kLeastWeight).log()).sum(-1).view({B, T});
  }
  return net_.norm(c + m).view({B, T, D});
}

SpeculationOutput InterlayerModel::Compute(const RoutingWindow& window,
                                           KeyedDropout* dropout, TokenMemory* past) {
  const int64_t H = NumLeads(window.stack, window.source_layer);
  const ExpertSlots slots = SlotsOf(window, ContextOf(window, config_.context));
  const auto mask = SlotMask(slots, window.stack, past);
  auto x = net_.embed(slots, window, dropout, KnownTokens(past));
  at::Tensor balance;
  for (int i = 0; i < config_.layers; ++i) {
    if (net_.mixtures.empty() || i % 2 == 0) {
      const size_t at = static_cast<size_t>(net_.mixtures.empty() ? i : i / 2);
      x = net_.layers[at](x, mask, dropout, past);
      continue;
    }
    const MixtureLayer& layer = net_.mixtures[static_cast<size_t>(i / 2)];
    const auto y = layer.attention(x, mask, dropout, past);
    const auto mixed = layer.experts(y, slots.valid_BTR.flatten(1, 2), dropout);
    x = layer.out_norm(y + (*dropout)(mixed.rows));
    balance = balance.defined() ? balance + mixed.balance : mixed.balance;
  }
  SpeculationOutput out;
  const bool entropy = dropout->active() && window.training.pattern_entropy;
  const auto pooled = Pool(x, slots, entropy ? &out.pattern_entropy_BT : nullptr);
  const auto token = (*dropout)(pooled).unsqueeze(2);  // [B,T,1,D]
  const auto lead = net_.lead.Rows(0, H);
  // A linear map of token + lead, the token's part once for all leads.
  const auto of_both = [&](const LinearLayer& map) {
    const auto rows = map(token).expand({-1, -1, H, -1});
    return at::gelu(AddRows(rows, Product(lead, map.weight)));
  };
  const auto inner = (*dropout)(of_both(net_.head_in));
  const auto hidden = (*dropout)(at::gelu(net_.head_mid(inner)));
  const auto confidence = net_.confidence_out(of_both(net_.confidence_in));
  out.logits_BTHE = net_.head_out(hidden);
  if (prior_) out.logits_BTHE = prior_->AddTo(out.logits_BTHE, window);
  if (!net_.backups.empty()) {
    out.backups_BTHKE = net_.backups[0](hidden).unflatten(
        3, {config_.backup_experts, config_.geometry.num_experts});
  }
  if (dropout->active()) {
    out.features_BTHD = AddRows(token.expand({-1, -1, H, -1}), lead);
    out.expert_keys_ED = net_.embed.Keys();
  }
  out.confidence_BTH = at::sigmoid(confidence.to(at::kFloat)).squeeze(3);
  if (balance.defined()) {
    const auto tokens = window.valid_BT.view({members(), -1}).sum(1).to(at::kFloat);
    out.own_loss = balance * tokens * kBalanceWeight;
  }
  if (dropout->active() && window.training.hidden_ids_BTL.defined()) {
    const auto hidden = net_.embed.HiddenIdLoss(x, window);
    out.own_loss = out.own_loss.defined() ? out.own_loss + hidden : hidden;
  }
  return out;
}

}  // namespace

std::unique_ptr<SpeculationModel> MakeInterlayer(const SpeculationConfig& config,
                                                 const ModelSeeds& seeds) {
  return std::make_unique<InterlayerModel>(config, seeds);
}

}  // namespace routecast
