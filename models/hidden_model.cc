#include <ATen/ATen.h>

#include <algorithm>

#include "models/speculation_kinds.h"
#include "models/speculation_layers.h"

namespace routecast {
namespace {

constexpr int kTokenWidth = 64;

struct ResidualBlock {
  ResidualBlock(ParameterMaker* make, const std::string& name, int64_t width, int64_t ff)
      : norm(make, name + ".norm", width),
        in(make, name + ".in", width, ff),
        out(make, name + ".out", ff, width) {}
  at::Tensor operator()(const at::Tensor& x, KeyedDropout* dropout) const {
    return x + (*dropout)(out((*dropout)(at::gelu(in(norm(x))))));
  }
  NormLayer norm;
  LinearLayer in, out;
};

struct StateInput {
  StateInput(ParameterMaker* make, int64_t hidden_width, int64_t width)
      : norm(make, "state.norm", hidden_width),
        linear(make, "state.linear", hidden_width, width),
        absent(make->Normal("state.absent", {width}, 0.02)) {}
  NormLayer norm;
  LinearLayer linear;
  at::Tensor absent;  // in place of a state that is not known
};

struct HiddenNet {
  HiddenNet(const SpeculationConfig& c, ParameterMaker make);
  std::vector<StateInput> state;  // one, or none where states are not a feature
  at::Tensor token;               // [V,kTokenWidth]
  LinearLayer token_in;
  at::Tensor source;         // [layers + 2,width]: each stack's sources from -1 on
  at::Tensor own, previous;  // [layers * E + 1,width]; the last row is "unknown"
  at::Tensor lead;           // [most leads,width]
  std::vector<ResidualBlock> blocks;
  NormLayer norm;
  at::Tensor output, output_bias;  // [layers,E,width], [layers,E]: by target layer
  LinearLayer confidence;
};

HiddenNet::HiddenNet(const SpeculationConfig& c, ParameterMaker make)
    : token(make.Normal("token.embedding", {c.vocab_size, kTokenWidth}, 0.02)),
      token_in(&make, "token.linear", kTokenWidth, c.width),
      source(
          make.Normal("source.embedding", {c.geometry.num_layers() + 2, c.width}, 0.02)),
      own(make.Normal("own_experts.embedding", {c.geometry.num_keys() + 1, c.width},
                      0.02)),
      previous(make.Normal(
          "previous_experts.embedding",
          {c.geometry.decoder_layers * c.geometry.num_experts + 1, c.width}, 0.02)),
      lead(make.Normal(
          "lead.embedding",
          {std::max(c.geometry.encoder_layers, c.geometry.decoder_layers), c.width},
          0.02)),
      norm(&make, "norm", c.width),
      output(make.Xavier("output.weight",
                         {c.geometry.num_layers(), c.geometry.num_experts, c.width})),
      output_bias(make.Constant("output.bias",
                                {c.geometry.num_layers(), c.geometry.num_experts}, 0)),
      confidence(&make, "confidence", c.width, 1) {
  if (c.hidden_width > 0) state.emplace_back(&make, c.hidden_width, c.width);
  for (int i = 0; i < c.layers; ++i) {
    blocks.emplace_back(&make, "block." + std::to_string(i), c.width, c.ff);
  }
}

class HiddenModel final : public SpeculationModel {
 public:
  HiddenModel(const SpeculationConfig& config, uint64_t seed)
      : SpeculationModel(config), net_(config, ParameterMaker(&parameters_, seed)) {}
  int history_tokens() const override { return 2; }
  SpeculationOutput Forward(const RoutingWindow& window, uint64_t dropout_key) override;

 private:
  at::Tensor Features(const RoutingWindow& window) const;
  at::Tensor Experts(const at::Tensor& table, const at::Tensor& ids_BTL,
                     int first_layer) const;
  at::Tensor Logits(const at::Tensor& z_HND, const RoutingWindow& window) const;

  HiddenNet net_;
};

// Sum over layers of the embeddings of (layer, expert); first_layer is the table's layer
// of column 0.
at::Tensor HiddenModel::Experts(const at::Tensor& table, const at::Tensor& ids_BTL,
                                int first_layer) const {
  const int64_t experts = config_.geometry.num_experts;
  const auto layers =
      at::arange(first_layer, first_layer + ids_BTL.size(2), ids_BTL.options());
  const auto rows =
      (ids_BTL + layers * experts).masked_fill(ids_BTL.eq(experts), table.size(0) - 1);
  return at::embedding(table, rows).sum(2);
}

at::Tensor HiddenModel::Features(const RoutingWindow& window) const {
  const MoeGeometry& g = config_.geometry;
  const int source_row = window.source_layer + 1 +
                         (window.stack == Stack::kEncoder ? 0 : g.encoder_layers + 1);
  auto x = net_.token_in(at::embedding(net_.token, window.token_ids_BT)) +
           net_.source.select(0, source_row);
  if (!net_.state.empty()) {
    const StateInput& state = net_.state[0];
    const bool known = window.hidden_BTD.defined() && window.source_layer >= 0;
    x = x + (known ? state.linear(state.norm(window.hidden_BTD)) : state.absent);
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
  const int64_t after = g.layers(window.stack) - 1 - window.source_layer;
  const auto part = [&](int64_t first_lead, int64_t first_target, int64_t count) {
    return at::baddbmm(net_.output_bias.narrow(0, first_target, count).unsqueeze(1),
                       z_HND.narrow(0, first_lead, count),
                       net_.output.narrow(0, first_target, count).transpose(1, 2));
  };
  const int64_t wrapped = z_HND.size(0) - after;
  if (wrapped == 0) return part(0, base + window.source_layer + 1, after);
  if (after == 0) return part(0, base, wrapped);
  return at::cat(
      {part(0, base + window.source_layer + 1, after), part(after, base, wrapped)});
}

SpeculationOutput HiddenModel::Forward(const RoutingWindow& window,
                                       uint64_t dropout_key) {
  const int64_t B = window.token_ids_BT.size(0), T = window.token_ids_BT.size(1);
  const int64_t H = NumLeads(window.stack, window.source_layer);
  const int64_t E = config_.geometry.num_experts;
  if (H == 0 || B * T == 0) {
    const auto options = net_.token.options().requires_grad(false);
    return {at::zeros({B, T, H, E}, options), at::zeros({B, T, H}, options)};
  }
  KeyedDropout dropout(config_.dropout, dropout_key);
  auto x = dropout(Features(window).view({B * T, config_.width}));
  for (const ResidualBlock& block : net_.blocks) x = block(x, &dropout);
  const auto z = net_.norm(x).unsqueeze(0) + net_.lead.narrow(0, 0, H).unsqueeze(1);
  return {Logits(z, window).transpose(0, 1).reshape({B, T, H, E}),
          at::sigmoid(net_.confidence(z)).squeeze(2).t().reshape({B, T, H})};
}

}  // namespace

std::unique_ptr<SpeculationModel> MakeHiddenModel(const SpeculationConfig& config,
                                                  uint64_t seed) {
  return std::make_unique<HiddenModel>(config, seed);
}

}  // namespace routecast
