// Leads one after another: a decoder over the leads of a token attends to the encoded
// context of expert ids (that of `interlayer`), and each lead is told the expert of the
// lead before: in training the true one, else its own likeliest (greedy), or each of the
// K likeliest joint continuations so far, whose answers are mixed by their probabilities.
// Tokens do not see each other here, so decoders stay causal. Published as a plan,
// defined by us. M members, B sequences, T tokens, R rows a token, H leads, E experts, D
// width.
#include <ATen/ATen.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "models/expert_embedding.h"
#include "models/markov_prior.h"
#include "models/trunk_model.h"

namespace routecast {
namespace {

// A post-norm decoder layer: over the leads so far, over the context, D -> F -> D.
struct LeadLayer {
  LeadLayer(ParameterMaker* make, const std::string& name, const SpeculationConfig& c)
      : leads(make, name, c.width, c.heads),
        context(make, name + ".context", c.width, c.heads),
        context_norm(make, name + ".context_norm", c.width),
        in(make, name + ".in", c.width, c.ff),
        out(make, name + ".out", c.ff, c.width),
        out_norm(make, name + ".out_norm", c.width) {}
  at::Tensor operator()(const at::Tensor& y, const at::Tensor& mask,
                        const at::Tensor& rows, const at::Tensor& rows_mask,
                        KeyedDropout* dropout) const {
    const auto a = leads(y, mask, dropout);
    const auto b = context_norm(a + (*dropout)(context(a, rows, rows_mask)));
    const auto inner = (*dropout)(at::gelu(in(b)));
    return out_norm(b + (*dropout)(out(inner)));
  }
  AttentionBlock leads;
  AttentionLayer context;
  NormLayer context_norm;
  LinearLayer in, out;
  NormLayer out_norm;
};

class AutoregressiveModel final : public TrunkModel {
 public:
  AutoregressiveModel(const SpeculationConfig& c, const ModelSeeds& seeds)
      : TrunkModel(c, static_cast<int64_t>(seeds.size())),
        make_(&parameters_, seeds),
        embed_(&make_, c),
        lead_(&make_, "lead.embedding",
              std::max(c.geometry.encoder_layers, c.geometry.decoder_layers), c.width,
              0.02),
        before_(&make_, "before.embedding", c.geometry.num_experts + 1, c.width, 1),
        head_(&make_, "head", c.width, c.geometry.num_experts) {
    for (int i = 0; i < c.layers; ++i) {
      encoder_.emplace_back(&make_, "layer." + std::to_string(i), c.width, c.heads, c.ff);
    }
    for (int i = 0; i < c.layers; ++i) {
      decoder_.emplace_back(&make_, "decoder." + std::to_string(i), c);
    }
    if (c.priors) prior_.emplace(&make_, &constants_, c.geometry);
  }
  void FitPriors(const BaselineTables& tables) override {
    if (prior_) prior_->Fit(tables);
  }

 protected:
  SpeculationOutput Compute(const RoutingWindow& window, KeyedDropout* dropout,
                            TokenMemory* past) override;

 private:
  struct Context {
    at::Tensor rows_NRD, mask;  // N = B * T tokens
    at::Tensor newest_N1;       // the newest known expert of each, E = none
  };
  Context Encode(const RoutingWindow& window, KeyedDropout* dropout,
                 TokenMemory* past) const;
  // before_NH: the expert of the lead before each. [N,H,D]
  at::Tensor Decode(const Context& context, const at::Tensor& before_NH,
                    const RoutingWindow& window, KeyedDropout* dropout) const;
  at::Tensor Logits(const at::Tensor& h_NHD, const RoutingWindow& window) const;
  at::Tensor Greedy(const Context& context, const RoutingWindow& window, int64_t leads,
                    KeyedDropout* dropout) const;
  at::Tensor Beams(const Context& context, const RoutingWindow& window, int64_t leads,
                   KeyedDropout* dropout) const;

  ParameterMaker make_;
  ExpertEmbedding embed_;
  EmbeddingLayer lead_, before_;
  LinearLayer head_;
  std::vector<EncoderLayer> encoder_;
  std::vector<LeadLayer> decoder_;
  std::optional<MarkovPrior> prior_;
};

AutoregressiveModel::Context AutoregressiveModel::Encode(const RoutingWindow& window,
                                                         KeyedDropout* dropout,
                                                         TokenMemory* past) const {
  const ExpertSlots slots = SlotsOf(window, ContextOf(window, config_.context));
  const auto mask = SlotMask(slots, window.stack, past);
  auto x = embed_(slots, window, dropout, KnownTokens(past));
  for (const EncoderLayer& layer : encoder_) x = layer(x, mask, dropout, past);
  const int64_t N = slots.ids_BTR.size(0) * slots.ids_BTR.size(1);
  const int64_t R = slots.ids_BTR.size(2);
  return {x.view({N, R, config_.width}), AdditiveMask(slots.valid_BTR.view({N, 1, 1, R})),
          slots.ids_BTR.select(2, R - 1).reshape({N, 1})};
}

at::Tensor AutoregressiveModel::Decode(const Context& context,
                                       const at::Tensor& before_NH,
                                       const RoutingWindow& window,
                                       KeyedDropout* dropout) const {
  const int64_t N = before_NH.size(0), H = before_NH.size(1);
  const auto place = at::arange(H, before_NH.options());
  const auto mask = AdditiveMask(place.unsqueeze(0).le(place.unsqueeze(1)));
  const auto told = before_(before_NH).reshape({window.token_ids_BT.size(0), -1});
  auto y =
      AddRows(Mixed(told, window.training).view({N, H, config_.width}), lead_.Rows(0, H));
  for (const LeadLayer& layer : decoder_) {
    y = layer(y, mask, context.rows_NRD, context.mask, dropout);
  }
  return y;
}

at::Tensor AutoregressiveModel::Logits(const at::Tensor& h_NHD,
                                       const RoutingWindow& window) const {
  const auto logits =
      head_(h_NHD).view({window.token_ids_BT.size(0), window.token_ids_BT.size(1),
                         h_NHD.size(1), config_.geometry.num_experts});
  return prior_ ? prior_->AddTo(logits, window) : logits;
}

at::Tensor AutoregressiveModel::Greedy(const Context& context,
                                       const RoutingWindow& window, int64_t leads,
                                       KeyedDropout* dropout) const {
  at::Tensor before = context.newest_N1;
  for (int64_t h = 1;; ++h) {
    const auto logits = Logits(Decode(context, before, window, dropout), window);
    if (h == leads) return logits;
    const auto next = logits.detach().select(2, h - 1).argmax(-1).view({-1, 1});
    before = at::cat({before, next}, 1);
  }
}

// [B,T,leads,E]: log-probabilities of each lead, mixed over the continuations that are
// followed. With as many as there are it is the marginal of the joint probability.
at::Tensor AutoregressiveModel::Beams(const Context& context, const RoutingWindow& window,
                                      int64_t leads, KeyedDropout* dropout) const {
  const int64_t E = config_.geometry.num_experts, N = context.newest_N1.size(0);
  const int64_t B = window.token_ids_BT.size(0), T = window.token_ids_BT.size(1);
  at::Tensor prior_NHE = at::zeros({B, T, leads, E}, context.rows_NRD.options());
  if (prior_) prior_NHE = prior_->AddTo(prior_NHE, window);
  prior_NHE = prior_NHE.view({N, leads, E});
  at::Tensor before_NKH = context.newest_N1.unsqueeze(1);
  at::Tensor joint_NK = at::zeros({N, 1}, prior_NHE.options());
  std::vector<at::Tensor> by_lead;
  for (int64_t h = 0; h < leads; ++h) {
    const int64_t K = before_NKH.size(1);
    const Context each{context.rows_NRD.repeat_interleave(K, 0),
                       context.mask.repeat_interleave(K, 0), context.newest_N1};
    const auto y = Decode(each, before_NKH.reshape({N * K, h + 1}), window, dropout);
    const auto logits = head_(y.select(1, h)).view({N, K, E}) + prior_NHE.narrow(1, h, 1);
    const auto logs_NKE = at::log_softmax(logits, 2);
    const auto share_NK1 = at::log_softmax(joint_NK, 1).unsqueeze(2);
    by_lead.push_back(at::logsumexp(share_NK1 + logs_NKE, 1));
    const auto all = (joint_NK.unsqueeze(2) + logs_NKE).flatten(1);
    const auto [score, place] = all.topk(std::min<int64_t>(config_.beams, K * E), 1);
    const auto from = at::floor_divide(place, E).unsqueeze(2).expand({-1, -1, h + 1});
    joint_NK = score;
    before_NKH =
        at::cat({before_NKH.gather(1, from), place.remainder(E).unsqueeze(2)}, 2);
  }
  return at::stack(by_lead, 1).view({B, T, leads, E});
}

SpeculationOutput AutoregressiveModel::Compute(const RoutingWindow& window,
                                               KeyedDropout* dropout, TokenMemory* past) {
  const int64_t H = NumLeads(window.stack, window.source_layer);
  const int64_t B = window.token_ids_BT.size(0), T = window.token_ids_BT.size(1);
  const Context context = Encode(window, dropout, past);
  SpeculationOutput out;
  const at::Tensor& truth = window.training.teacher_BTH;
  if (truth.defined() && dropout->active()) {
    const auto told = at::where(truth.ge(0), truth, config_.geometry.num_experts)
                          .view({B * T, H})
                          .narrow(1, 0, H - 1);
    const auto h =
        Decode(context, at::cat({context.newest_N1, told}, 1), window, dropout);
    out.logits_BTHE = Logits(h, window);
    out.features_BTHD = h.view({B, T, H, config_.width});
    out.expert_keys_ED = embed_.Keys();
  } else {
    out.logits_BTHE = config_.beams > 1 ? Beams(context, window, H, dropout)
                                        : Greedy(context, window, H, dropout);
  }
  out.confidence_BTH = LargestProbability(out.logits_BTHE);
  if (dropout->active() && window.training.hidden_ids_BTL.defined()) {
    out.own_loss = embed_.HiddenIdLoss(context.rows_NRD, window);
  }
  return out;
}

}  // namespace

std::unique_ptr<SpeculationModel> MakeAutoregressive(const SpeculationConfig& config,
                                                     const ModelSeeds& seeds) {
  return std::make_unique<AutoregressiveModel>(config, seeds);
}

}  // namespace routecast
