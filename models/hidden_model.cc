#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>

#include "models/baseline_predictors.h"
#include "models/small_math.h"
#include "models/speculation_kinds.h"
#include "models/speculation_layers.h"

namespace routecast {
namespace {

constexpr int kTokenWidth = 64;
constexpr int64_t kFewRows = 8;  // up to here tensor calls cost more than the arithmetic

const float* Data(const at::Tensor& t) { return t.const_data_ptr<float>(); }

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

// Log-probabilities of the train part's counts, added to the logits with a gain by
// source: the model starts as good as the counts and learns what they miss.
struct Priors {
  at::Tensor token;   // [V,layers * E]: of the experts, given the own token's id
  at::Tensor markov;  // [L * (E + 1),L * E], L of the decoder: of the experts at each
                      // lead from (source layer, its expert); zeros where that is unknown
  at::Tensor gain;    // [layers + 2], parameter
};

struct HiddenNet {
  HiddenNet(const SpeculationConfig& c, ParameterMaker make);
  std::vector<StateInput> state;  // one, or none where states are not a feature
  at::Tensor token;               // [V,kTokenWidth]
  LinearLayer token_in;
  std::vector<Priors> priors;  // one or none
  // [2 n,width,kTokenWidth]: of the tokens n..1 to the left, then 1..n to the right,
  // which the decoder does not see. None where neighbours are not a feature.
  std::vector<at::Tensor> neighbours;
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
  if (c.neighbours > 0) {
    neighbours.push_back(make.Xavier("neighbours.weight",
                                     {2 * int64_t{c.neighbours}, c.width, kTokenWidth}));
  }
  for (int i = 0; i < c.layers; ++i) {
    blocks.emplace_back(&make, "block." + std::to_string(i), c.width, c.ff);
  }
}

class HiddenModel final : public SpeculationModel {
 public:
  HiddenModel(const SpeculationConfig& config, uint64_t seed)
      : SpeculationModel(config), net_(config, ParameterMaker(&parameters_, seed)) {
    if (config.priors) AddPriors();
  }
  void FitPriors(const BaselineTables& tables) override;
  int history_tokens() const override { return 1 + std::max(1, config_.neighbours); }
  SpeculationOutput Forward(const RoutingWindow& window, uint64_t dropout_key) override;
  SpeculationOutput ForwardLast(const RoutingWindow& window) override;

 private:
  void AddPriors();
  int SourceRow(const RoutingWindow& window) const {
    return window.source_layer + 1 +
           (window.stack == Stack::kEncoder ? 0 : config_.geometry.encoder_layers + 1);
  }
  // Leads whose targets are layers of the same token.
  int64_t NumSameToken(const RoutingWindow& window) const {
    return config_.geometry.layers(window.stack) - 1 - window.source_layer;
  }
  at::Tensor PriorLogits(const RoutingWindow& window, int64_t leads) const;
  void AddPriorRow(const RoutingWindow& window, int64_t row, int leads,
                   float* logits) const;
  int NumNeighbours(Stack stack) const {
    return (stack == Stack::kEncoder ? 2 : 1) * config_.neighbours;
  }
  // Of neighbour i, from the own token; negative = left.
  int OffsetOf(int i) const {
    return i < config_.neighbours ? i - config_.neighbours : i - config_.neighbours + 1;
  }
  at::Tensor Features(const RoutingWindow& window) const;
  at::Tensor Experts(const at::Tensor& table, const at::Tensor& ids_BTL,
                     int first_layer) const;
  at::Tensor Logits(const at::Tensor& z_HND, const RoutingWindow& window) const;
  bool Few(const RoutingWindow& window, uint64_t dropout_key) const;
  // Of the window's tokens from `first` on, sequence by sequence: b * T + t.
  static std::vector<int64_t> RowsFrom(const RoutingWindow& window, int64_t first);
  void AddTokens(const RoutingWindow& window, const std::vector<int64_t>& rows,
                 std::vector<float>* x) const;
  std::vector<float> FewFeatures(const RoutingWindow& window,
                                 const std::vector<int64_t>& rows) const;
  void AddExperts(const RoutingWindow& window, int64_t row, float* x) const;
  SpeculationOutput FewForward(const RoutingWindow& window, int64_t first) const;

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

at::Tensor HiddenModel::Features(const RoutingWindow& window) const {
  const MoeGeometry& g = config_.geometry;
  const int source_row = SourceRow(window);
  auto x = net_.token_in(at::embedding(net_.token, window.token_ids_BT)) +
           net_.source.select(0, source_row);
  for (int i = 0; i < NumNeighbours(window.stack); ++i) {
    x = x +
        at::linear(at::embedding(net_.token, Shifted(window.token_ids_BT, OffsetOf(i))),
                   net_.neighbours[0].select(0, i));
  }
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
  const int64_t after = NumSameToken(window);
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

void HiddenModel::AddPriors() {
  const MoeGeometry& g = config_.geometry;
  const int64_t layers = g.decoder_layers, experts = g.num_experts;
  Priors priors;
  priors.token = at::zeros({config_.vocab_size, g.num_keys()});
  priors.markov = at::zeros({layers * (experts + 1), layers * experts});
  priors.gain = at::ones({g.num_layers() + 2});
  constants_.Add("prior.token", priors.token);
  constants_.Add("prior.markov", priors.markov);
  parameters_.Add("prior.gain", priors.gain.requires_grad_());
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
at::Tensor HiddenModel::PriorLogits(const RoutingWindow& window, int64_t leads) const {
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
  return at::cat(parts, 2) * priors.gain[SourceRow(window)];
}

// The same for one row, added to its logits [leads,E].
void HiddenModel::AddPriorRow(const RoutingWindow& window, int64_t row, int leads,
                              float* logits) const {
  const Priors& priors = net_.priors[0];
  const MoeGeometry& g = config_.geometry;
  const int64_t E = g.num_experts, after = NumSameToken(window);
  const float gain = Data(priors.gain)[SourceRow(window)];
  const auto add = [&](const float* from, int64_t first_lead, int64_t count) {
    for (int64_t i = 0; i < count * E; ++i) logits[first_lead * E + i] += gain * from[i];
  };
  if (after > 0) {
    const int64_t id = window.token_ids_BT.const_data_ptr<int64_t>()[row];
    const int64_t layer = g.GlobalLayer(window.stack, window.source_layer + 1);
    add(Data(priors.token) + (id * g.num_layers() + layer) * E, 0, after);
  }
  if (leads > after) {
    const int64_t L = g.decoder_layers, source = window.source_layer;
    const int64_t expert =
        window.experts_BTL
            .const_data_ptr<int64_t>()[row * window.experts_BTL.size(2) + source];
    add(Data(priors.markov) + ((source * (E + 1) + expert) * L + after) * E, after,
        leads - after);
  }
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
  if (Few(window, dropout_key)) return FewForward(window, 0);
  KeyedDropout dropout(config_.dropout, dropout_key);
  auto x = dropout(Features(window).view({B * T, config_.width}));
  for (const ResidualBlock& block : net_.blocks) x = block(x, &dropout);
  const auto z = net_.norm(x).unsqueeze(0) + net_.lead.narrow(0, 0, H).unsqueeze(1);
  auto logits = Logits(z, window).transpose(0, 1).reshape({B, T, H, E});
  if (!net_.priors.empty()) logits = logits + PriorLogits(window, H);
  return {logits, at::sigmoid(net_.confidence(z)).squeeze(2).t().reshape({B, T, H})};
}

SpeculationOutput HiddenModel::ForwardLast(const RoutingWindow& window) {
  if (NumLeads(window.stack, window.source_layer) == 0 || !Few(window, 0)) {
    return SpeculationModel::ForwardLast(window);
  }
  return FewForward(window, window.token_ids_BT.size(1) - 1);
}

bool HiddenModel::Few(const RoutingWindow& window, uint64_t dropout_key) const {
  const bool contiguous =
      window.token_ids_BT.is_contiguous() && window.experts_BTL.is_contiguous() &&
      (!window.hidden_BTD.defined() ||
       (window.hidden_BTD.is_contiguous() && window.hidden_BTD.dtype() == at::kFloat));
  return contiguous && dropout_key == 0 && !c10::GradMode::is_enabled() &&
         window.token_ids_BT.numel() <= kFewRows && net_.token.is_cpu();
}

// Adds the embeddings of the experts that row (b, t) may see.
void HiddenModel::AddExperts(const RoutingWindow& window, int64_t row, float* x) const {
  const MoeGeometry& g = config_.geometry;
  const int64_t L = window.experts_BTL.size(2), T = window.token_ids_BT.size(1);
  const int64_t D = config_.width, E = g.num_experts;
  const int64_t* ids = window.experts_BTL.const_data_ptr<int64_t>() + row * L;
  const auto add = [&](const at::Tensor& table, int64_t layer, int64_t id) {
    TORCH_CHECK(id >= 0 && id <= E, "an expert id out of range");
    const int64_t at = id == E ? table.size(0) - 1 : layer * E + id;
    AddValues(Data(table) + at * D, static_cast<int>(D), x);
  };
  for (int l = 0; l <= window.source_layer; ++l) {
    add(net_.own, g.GlobalLayer(window.stack, l), ids[l]);
  }
  if (window.stack == Stack::kEncoder) return;
  for (int64_t l = 0; l < L; ++l) add(net_.previous, l, row % T == 0 ? E : ids[l - L]);
}

std::vector<int64_t> HiddenModel::RowsFrom(const RoutingWindow& window, int64_t first) {
  const int64_t B = window.token_ids_BT.size(0), T = window.token_ids_BT.size(1);
  std::vector<int64_t> rows;
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t t = first; t < T; ++t) rows.push_back(b * T + t);
  }
  return rows;
}

// Sets x to what the ids of each row's token and its neighbours give.
void HiddenModel::AddTokens(const RoutingWindow& window, const std::vector<int64_t>& rows,
                            std::vector<float>* x) const {
  const int count = static_cast<int>(rows.size()), D = config_.width;
  const int64_t T = window.token_ids_BT.size(1);
  const int64_t* ids = window.token_ids_BT.const_data_ptr<int64_t>();
  std::vector<float> tokens(rows.size() * kTokenWidth), part(x->size());
  const std::vector<float> no_bias(size_t(D), 0.f);
  const auto embed = [&](int offset) {
    for (size_t r = 0; r < rows.size(); ++r) {
      const int64_t t = rows[r] % T + offset;
      const int64_t id = t >= 0 && t < T ? ids[rows[r] + offset] : 0;
      TORCH_CHECK(id >= 0 && id < config_.vocab_size, "a token id out of range");
      std::copy_n(Data(net_.token) + id * kTokenWidth, kTokenWidth,
                  tokens.data() + r * kTokenWidth);
    }
  };
  embed(0);
  DenseRows(tokens.data(), count, kTokenWidth, Data(net_.token_in.weight),
            Data(net_.token_in.bias), D, x->data());
  for (int i = 0; i < NumNeighbours(window.stack); ++i) {
    embed(OffsetOf(i));
    DenseRows(tokens.data(), count, kTokenWidth,
              Data(net_.neighbours[0]) + size_t(i) * size_t(D) * kTokenWidth,
              no_bias.data(), D, part.data());
    AddValues(part.data(), count * D, x->data());
  }
}

// The same as Features.
std::vector<float> HiddenModel::FewFeatures(const RoutingWindow& window,
                                            const std::vector<int64_t>& rows) const {
  const int count = static_cast<int>(rows.size()), D = config_.width;
  const int source_row = SourceRow(window), S = config_.hidden_width;
  std::vector<float> x(rows.size() * size_t(D));
  AddTokens(window, rows, &x);
  const bool known = window.hidden_BTD.defined() && window.source_layer >= 0;
  if (!net_.state.empty() && known) {
    const StateInput& in = net_.state[0];
    std::vector<float> normed(rows.size() * size_t(S)), state(x.size());
    for (size_t r = 0; r < rows.size(); ++r) {
      NormRows(Data(window.hidden_BTD) + rows[r] * S, 1, S, Data(in.norm.weight),
               Data(in.norm.bias), normed.data() + r * size_t(S));
    }
    DenseRows(normed.data(), count, S, Data(in.linear.weight), Data(in.linear.bias), D,
              state.data());
    AddValues(state.data(), count * D, x.data());
  }
  for (size_t r = 0; r < rows.size(); ++r) {
    float* row = x.data() + r * size_t(D);
    AddValues(Data(net_.source) + source_row * D, D, row);
    if (!net_.state.empty() && !known) AddValues(Data(net_.state[0].absent), D, row);
    AddExperts(window, rows[r], row);
  }
  return x;
}

// The same as Forward without dropout, for a few rows on the CPU: those of the tokens
// from `first` on.
SpeculationOutput HiddenModel::FewForward(const RoutingWindow& window,
                                          int64_t first) const {
  const std::vector<int64_t> rows = RowsFrom(window, first);
  const int H = NumLeads(window.stack, window.source_layer), D = config_.width;
  const int E = config_.geometry.num_experts, count = static_cast<int>(rows.size());
  const int ff = config_.ff, L = config_.geometry.layers(window.stack);
  std::vector<float> x = FewFeatures(window, rows), y(x.size()),
                     wide(rows.size() * size_t(ff));
  for (const ResidualBlock& block : net_.blocks) {
    NormRows(x.data(), count, D, Data(block.norm.weight), Data(block.norm.bias),
             y.data());
    DenseRows(y.data(), count, D, Data(block.in.weight), Data(block.in.bias), ff,
              wide.data());
    GeluValues(wide.data(), count * ff);
    DenseRows(wide.data(), count, ff, Data(block.out.weight), Data(block.out.bias), D,
              y.data());
    AddValues(y.data(), count * D, x.data());
  }
  NormRows(x.data(), count, D, Data(net_.norm.weight), Data(net_.norm.bias), x.data());
  const int64_t B = window.token_ids_BT.size(0), T = count / B;
  auto logits = at::empty({B, T, H, E}), confidence = at::empty({B, T, H});
  float* guess = confidence.data_ptr<float>();
  for (int r = 0; r < count; ++r) {
    float* row = logits.data_ptr<float>() + int64_t{r} * H * E;
    for (int h = 0; h < H; ++h) {
      std::copy_n(x.data() + size_t(r) * D, D, y.data());
      AddValues(Data(net_.lead) + size_t(h) * D, D, y.data());
      const int64_t target =
          config_.geometry.GlobalLayer(window.stack, (window.source_layer + 1 + h) % L);
      DenseRows(y.data(), 1, D, Data(net_.output) + target * E * D,
                Data(net_.output_bias) + target * E, E, row + h * E);
      DenseRows(y.data(), 1, D, Data(net_.confidence.weight), Data(net_.confidence.bias),
                1, guess + int64_t{r} * H + h);
    }
    if (!net_.priors.empty()) AddPriorRow(window, rows[size_t(r)], H, row);
  }
  for (int i = 0; i < count * H; ++i) guess[i] = 1 / (1 + std::exp(-guess[i]));
  return {logits, confidence};
}

}  // namespace

std::unique_ptr<SpeculationModel> MakeHiddenModel(const SpeculationConfig& config,
                                                  uint64_t seed) {
  return std::make_unique<HiddenModel>(config, seed);
}

}  // namespace routecast
