#include "models/hidden_model.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "models/baseline_predictors.h"

namespace routecast {

HiddenNet::HiddenNet(const SpeculationConfig& c, ParameterMaker* make)
    : token(make, "token.embedding", c.vocab_size, kTokenWidth, 0.02),
      token_in(make, "token.linear", kTokenWidth, c.width),
      source(make, "source.embedding", c.geometry.num_layers() + 2, c.width, 0.02),
      own(make, "own_experts.embedding", c.geometry.num_keys() + 1, c.width, 0.02),
      previous(make, "previous_experts.embedding",
               c.geometry.decoder_layers * c.geometry.num_experts + 1, c.width, 0.02),
      lead(make, "lead.embedding",
           std::max(c.geometry.encoder_layers, c.geometry.decoder_layers), c.width, 0.02),
      norm(make, "norm", c.width),
      output(make->Xavier("output.weight",
                          {c.geometry.num_layers(), c.geometry.num_experts, c.width})),
      output_bias(make->Constant("output.bias",
                                 {c.geometry.num_layers(), c.geometry.num_experts}, 0)),
      confidence(make, "confidence", c.width, 1) {
  if (c.hidden_width > 0) {
    for (int i = 0; i < NumStates(c.geometry); ++i) {
      state.emplace_back(make, "state." + std::to_string(i), c.hidden_width, c.width);
    }
    no_state.push_back(make->Normal("state.absent", {c.width}, 0.02));
    context.emplace_back(make, "context", c.hidden_width, c.width);
    if (c.geometry.encoder_layers > 0 && c.geometry.decoder_layers > 0 && c.layers > 0) {
      reader.emplace_back(make, c.hidden_width, c.width, c.heads);
    }
  }
  if (c.encoder_attention) mixer.emplace_back(make, c.width, c.heads);
  for (int i = 0; c.attention_heads > 0 && i < NumStates(c.geometry); ++i) {
    const bool decoder = i >= c.geometry.encoder_layers - 1;
    attention.emplace_back(make, "attention." + std::to_string(i),
                           c.attention_heads * (decoder ? 2 : 1), kTokenWidth, c.width);
  }
  if (c.neighbours > 0) {
    neighbours.push_back(make->Xavier("neighbours.weight",
                                      {2 * int64_t{c.neighbours}, c.width, kTokenWidth}));
  }
  if (c.positions) {
    position.emplace_back(make, "position.embedding", kPositions, c.width, 0.02);
  }
  if (c.topk_inputs) gates.emplace_back(make, "gates", c.geometry.num_experts, c.width);
  if (c.next_token) next.emplace_back(make, c.width, kTokenWidth, c.vocab_size);
  if (c.later_use) {
    later.emplace_back(make, c.width,
                       int64_t{c.geometry.decoder_layers} * c.geometry.num_experts);
  }
  for (int i = 0; i < c.layers; ++i) {
    blocks.emplace_back(make, "block." + std::to_string(i), c.width, c.ff);
  }
}

at::Tensor TokenMixer::operator()(const at::Tensor& x_BTD,
                                  const at::Tensor& valid_BT) const {
  const int64_t B = x_BTD.size(0), T = x_BTD.size(1), A = attention.heads;
  const auto at = at::arange(T, valid_BT.options().dtype(at::kLong));
  const auto row = (at.unsqueeze(0) - at.unsqueeze(1)).clamp(-kReach, kReach) + kReach;
  const auto by_member = bias.view({-1, A, 2 * kReach + 1});
  const int64_t M = by_member.size(0);
  const auto near = by_member.index_select(2, row.flatten()).view({M, 1, A, T, T});
  const auto absent = valid_BT.logical_not().to(at::kFloat).mul(kMasked);
  const auto mask = near + absent.view({M, B / M, 1, 1, T});
  const auto y = norm(x_BTD.reshape({B * T, -1})).view(x_BTD.sizes());
  return attention(y, y, mask.view({B, A, T, T}));
}

int64_t HiddenNet::PositionRow(int64_t place) {
  constexpr int64_t kExact = 16;
  if (place < kExact) return place;
  const double doublings = std::log2(static_cast<double>(place) / kExact);
  return std::min<int64_t>(kPositions - 1, kExact + static_cast<int64_t>(4 * doublings));
}

// Sum over layers of the embeddings of (layer, expert); first_layer is the table's layer
// of column 0.
at::Tensor HiddenModel::Experts(const EmbeddingLayer& table, const at::Tensor& ids_BTL,
                                int first_layer) const {
  const int64_t experts = config_.geometry.num_experts;
  const auto layers =
      at::arange(first_layer, first_layer + ids_BTL.size(2), ids_BTL.options());
  const auto rows =
      (ids_BTL + layers * experts).masked_fill(ids_BTL.eq(experts), table.rows() - 1);
  return table(rows).sum(2);
}

// Row t holds token t + offset; the padding id beyond the ends.
at::Tensor Shifted(const at::Tensor& ids_BT, int64_t offset) {
  const int64_t tokens = ids_BT.size(1), kept = tokens - std::abs(offset);
  at::Tensor shifted = at::zeros_like(ids_BT);
  if (kept > 0) {
    shifted.narrow(1, std::max<int64_t>(0, -offset), kept)
        .copy_(ids_BT.narrow(1, std::max<int64_t>(0, offset), kept));
  }
  return shifted;
}

// What attention summaries say of each token [B,T,width].
at::Tensor HiddenModel::Attended(const RoutingWindow& window) const {
  const at::Tensor& ids = window.attended_ids_BTAK;
  if (!ids.defined()) {
    throw std::logic_error("no attention summaries for a model that reads them");
  }
  const AttentionInput& in = net_.attention[StateIndex(window)];
  const auto known = ids.ge(0).unsqueeze(4).to(at::kFloat);
  const auto sum = (net_.token(ids.clamp_min(0)) * known).sum(3);  // [B,T,A,kTokenWidth]
  const auto mean = sum / known.sum(3).clamp_min(1);
  return in.entropy(window.attention_entropy_BTA) + in.tokens(mean.flatten(2));
}

at::Tensor HiddenModel::Features(const RoutingWindow& window) const {
  const MoeGeometry& g = config_.geometry;
  auto x = AddRow(net_.token_in(net_.token(window.token_ids_BT)),
                  net_.source.Row(SourceRow(window)));
  for (int i = 0; i < NumNeighbours(window.stack); ++i) {
    const at::Tensor& weight = net_.neighbours[0];
    x = x + Product(net_.token(Shifted(window.token_ids_BT, OffsetOf(i))),
                    weight.select(weight.dim() - 3, i));
  }
  if (!net_.position.empty()) {
    const int64_t B = x.size(0), T = x.size(1);
    at::Tensor rows = at::empty({T}, at::kLong);
    for (int64_t t = 0; t < T; ++t) {
      rows.data_ptr<int64_t>()[t] = HiddenNet::PositionRow(window.first_token + t);
    }
    x = x + net_.position[0](rows.to(x.device()).unsqueeze(0).expand({B, T}));
  }
  if (!net_.state.empty()) {
    x = window.hidden_BTD.defined() ? x + StateOf(window)(window.hidden_BTD)
                                    : AddRow(x, net_.no_state[0]);
    if (window.stack == Stack::kDecoder) {
      // Not known is as before the first token.
      const auto& ids = window.token_ids_BT;
      x = x + net_.context[0](
                  window.context_BTD.defined()
                      ? window.context_BTD
                      : at::zeros({ids.size(0), ids.size(1), config_.hidden_width},
                                  x.options().requires_grad(false)));
    }
  }
  // They are recorded beside router inputs, always.
  if (!net_.attention.empty() && window.hidden_BTD.defined()) x = x + Attended(window);
  if (!net_.gates.empty() && window.source_layer >= 0) {
    RequireGates(window);
    x = x + net_.gates[0](window.gates_BTE);
  }
  if (window.source_layer >= 0) {
    x = x + Experts(net_.own, window.experts_BTL.narrow(2, 0, window.source_layer + 1),
                    g.GlobalLayer(window.stack, 0));
  }
  if (window.stack == Stack::kDecoder) {
    const auto& ids = window.experts_BTL;
    const auto before = at::cat({at::full_like(ids.narrow(1, 0, 1), g.num_experts),
                                 ids.narrow(1, 0, ids.size(1) - 1)},
                                1);
    x = x + Experts(net_.previous, before, 0);
  }
  return x;
}

// Each lead's rows through its target's matrix: targets after the source, then, in the
// decoder, those of the next token.
at::Tensor HiddenModel::Logits(const at::Tensor& z_HND,
                               const RoutingWindow& window) const {
  const MoeGeometry& g = config_.geometry;
  const int64_t base = g.GlobalLayer(window.stack, 0);
  const int64_t after = NumSameToken(window);
  const int64_t E = g.num_experts, M = members(), rows = z_HND.size(1);
  const auto part = [&](int64_t first_lead, int64_t first_target, int64_t count) {
    // Leads, then members, are the batch of the product.
    const auto of_members = [&](const at::Tensor& all, int64_t axis) {
      const auto some = all.narrow(axis, first_target, count);
      return M == 1 ? some : some.transpose(0, 1).flatten(0, 1);
    };
    const auto weight = of_members(net_.output, net_.output.dim() - 3);
    const auto bias = of_members(net_.output_bias, net_.output_bias.dim() - 2);
    const auto z = z_HND.narrow(0, first_lead, count).reshape({count * M, rows / M, -1});
    return at::baddbmm(bias.unsqueeze(1), z, weight.transpose(1, 2))
        .view({count, rows, E});
  };
  const int64_t wrapped = z_HND.size(0) - after;
  if (wrapped == 0) return part(0, base + window.source_layer + 1, after);
  if (after == 0) return part(0, base, wrapped);
  return at::cat(
      {part(0, base + window.source_layer + 1, after), part(after, base, wrapped)});
}

void HiddenModel::AddPriors() {
  const MoeGeometry& g = config_.geometry;
  const int64_t layers = g.decoder_layers, experts = g.num_experts;
  Priors priors;
  priors.token = at::zeros({config_.vocab_size, g.num_keys()});
  priors.markov = at::zeros({layers * (experts + 1), layers * experts});
  constants_.Add("prior.token", priors.token);
  constants_.Add("prior.markov", priors.markov);
  priors.gain = make_.Constant("prior.gain", {g.num_layers() + 2}, 1);
  if (config_.next_token) {
    priors.next_gain = make_.Constant("prior.next_gain", {g.num_layers() + 2}, 0.3);
  }
  net_.priors.push_back(std::move(priors));
}

void HiddenModel::FitPriors(const BaselineTables& tables) {
  if (net_.priors.empty()) return;
  const c10::NoGradGuard no_grad;
  const MoeGeometry& g = config_.geometry;
  const int E = g.num_experts, L = g.decoder_layers;
  TORCH_CHECK(tables.vocab_size() == config_.vocab_size, "tables of another vocabulary");
  at::Tensor token = at::empty({config_.vocab_size, g.num_keys()});
  for (int64_t v = 0; v < config_.vocab_size; ++v) {
    for (int layer = 0; layer < g.num_layers(); ++layer) {
      tables.Token(layer, v, token.data_ptr<float>() + v * g.num_keys() + layer * E);
    }
  }
  at::Tensor markov = at::ones({L * (E + 1), L * E});
  for (int source = 0; source < L; ++source) {
    for (int expert = 0; expert < E; ++expert) {
      float* row = markov.data_ptr<float>() + (source * (E + 1) + expert) * L * E;
      for (int lead = 1; lead <= L; ++lead) {
        tables.Markov1(g.encoder_layers + source, lead,
                       g.encoder_layers + (source + lead) % L, expert,
                       row + (lead - 1) * E);
      }
    }
  }
  net_.priors[0].token.copy_(token.log());
  net_.priors[0].markov.copy_(markov.log());
}

// [B,T,leads,E]: the own token's counts where the target is a layer of it, else those of
// the expert at the source layer.
at::Tensor HiddenModel::PriorLogits(const RoutingWindow& window, int64_t leads,
                                    const at::Tensor& next_BTV) const {
  const Priors& priors = net_.priors[0];
  const MoeGeometry& g = config_.geometry;
  const int64_t E = g.num_experts, B = window.token_ids_BT.size(0);
  const int64_t T = window.token_ids_BT.size(1), after = NumSameToken(window);
  std::vector<at::Tensor> parts;
  if (after > 0) {
    parts.push_back(
        at::embedding(priors.token, window.token_ids_BT)
            .view({B, T, g.num_layers(), E})
            .narrow(2, g.GlobalLayer(window.stack, window.source_layer + 1), after));
  }
  if (leads > after) {
    const int64_t L = g.decoder_layers, source = window.source_layer;
    parts.push_back(at::embedding(priors.markov,
                                  window.experts_BTL.select(2, source) + source * (E + 1))
                        .view({B, T, L, E})
                        .narrow(2, after, leads - after));
  }
  const auto scaled = [&](const at::Tensor& x, const at::Tensor& gains) {
    const auto gain = gains.select(-1, SourceRow(window)).view({members(), 1});
    return (x.reshape({members(), -1}) * gain).view(x.sizes());
  };
  at::Tensor logits = scaled(at::cat(parts, 2), priors.gain);
  if (!next_BTV.defined()) return logits;
  at::Tensor counts = scaled(NextTokenCounts(next_BTV, leads - after), priors.next_gain);
  if (after > 0) {
    counts = at::cat({at::zeros({B, T, after, E}, counts.options()), counts}, 2);
  }
  return logits + counts;
}

// [B,T,layers,E] log-probabilities for the first `layers` MoE layers of the next token:
// the token table's, mixed over the likeliest ids.
at::Tensor HiddenModel::NextTokenCounts(const at::Tensor& next_BTV,
                                        int64_t layers) const {
  const MoeGeometry& g = config_.geometry;
  const auto [score, id] =
      next_BTV.topk(std::min<int64_t>(HiddenNet::kGuesses, next_BTV.size(2)), 2);
  const at::Tensor counts =
      at::embedding(net_.priors[0].token, id)  // [B,T,K,keys]
          .narrow(3, g.GlobalLayer(Stack::kDecoder, 0) * int64_t{g.num_experts},
                  layers * g.num_experts)
          .exp();
  const at::Tensor mixed = at::matmul(at::softmax(score, 2).unsqueeze(2), counts);
  return mixed.squeeze(2).log().view(
      {next_BTV.size(0), next_BTV.size(1), layers, g.num_experts});
}

// [members], summed over tokens: what came after each, against what was said. Experts
// that the window hides count as none.
at::Tensor HiddenModel::LaterUseLoss(const at::Tensor& later_BTLE,
                                     const RoutingWindow& window) const {
  const at::Tensor& ids = window.experts_BTL;
  const int64_t B = ids.size(0), T = ids.size(1), L = ids.size(2);
  const int64_t E = config_.geometry.num_experts;
  const auto chosen = at::zeros({B, T, L, E + 1}, later_BTLE.options().dtype(at::kFloat))
                          .scatter_(3, ids.unsqueeze(3), 1.0)
                          .narrow(3, 0, E)
                          .reshape({B, T, L * E});
  const auto at = at::arange(T, chosen.options());
  const auto ahead = at.unsqueeze(0) - at.unsqueeze(1) - 1;  // [token,later token]
  const auto weight = at::pow(LaterUse::kDiscount, ahead.clamp_min(0))
                          .mul(1 - LaterUse::kDiscount)
                          .masked_fill(ahead.lt(0), 0);
  const auto came = at::matmul(weight, chosen).view({B, T, L, E});
  const auto said = at::log_softmax(later_BTLE.to(at::kFloat), 3);
  return (came * said).reshape({members(), -1}).sum(1) * -LaterUse::kWeight;
}

SpeculationOutput HiddenModel::Compute(const RoutingWindow& window, KeyedDropout* dropout,
                                       TokenMemory*) {
  const int64_t B = window.token_ids_BT.size(0), T = window.token_ids_BT.size(1);
  const int64_t H = NumLeads(window.stack, window.source_layer);
  const int64_t E = config_.geometry.num_experts;
  if (!dropout->active() && Few(window)) return FewForward(window, 0);
  auto x = (*dropout)(Features(window).view({B * T, config_.width}));
  for (size_t i = 0; i < net_.blocks.size(); ++i) {
    x = net_.blocks[i](x, dropout);
    if (i == 0 && !net_.mixer.empty() && window.stack == Stack::kEncoder) {
      const at::Tensor read =
          net_.mixer[0](x.view({B, T, config_.width}), window.valid_BT);
      x = x + (*dropout)(read.reshape({B * T, config_.width}));
    }
    if (i > 0 || net_.reader.empty() || !window.source_BSD.defined()) continue;
    const SourceReader& reader = net_.reader[0];
    const at::Tensor mask =
        window.source_valid_BS.logical_not().to(at::kFloat).mul(kMasked);
    const at::Tensor read = reader.attention(
        reader.query_norm(x).view({B, T, config_.width}),
        reader.Memory(window.source_BSD), mask.unsqueeze(1).unsqueeze(1));
    x = x + (*dropout)(read.reshape({B * T, config_.width}));
  }
  const at::Tensor y = net_.norm(x);
  std::vector<at::Tensor> by_lead;
  for (int64_t h = 0; h < H; ++h) by_lead.push_back(AddRow(y, net_.lead.Row(h)));
  const auto z = at::stack(by_lead);  // [H,B*T,D]
  auto logits = Logits(z, window).transpose(0, 1).reshape({B, T, H, E});
  at::Tensor next;
  if (GuessesNext(window, H)) {
    next = AddRow(Product(net_.next[0].query(y), net_.token.weight), net_.next[0].bias)
               .view({B, T, config_.vocab_size});
  }
  if (!net_.priors.empty()) logits = logits + PriorLogits(window, H, next);
  const auto confidence = net_.confidence(z.transpose(0, 1)).squeeze(2);
  SpeculationOutput out{logits, at::sigmoid(confidence.to(at::kFloat)).reshape({B, T, H}),
                        next};
  if (!SaysLaterUse(window)) return out;
  out.later_BTLE =
      net_.later[0].linear(y).view({B, T, config_.geometry.decoder_layers, E});
  if (dropout->active()) out.own_loss = LaterUseLoss(out.later_BTLE, window);
  return out;
}

std::unique_ptr<SpeculationModel> MakeHidden(const SpeculationConfig& config,
                                             const ModelSeeds& seeds) {
  return std::make_unique<HiddenModel>(config, seeds);
}

}  // namespace routecast
