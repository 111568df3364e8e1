// `hidden` over a few rows on the CPU: what prediction between two layers can afford.
#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "models/hidden_model.h"
#include "models/small_math.h"

namespace routecast {
namespace {

constexpr int64_t kFewRows = 8;  // up to here tensor calls cost more than the arithmetic

const float* Data(const at::Tensor& t) { return t.const_data_ptr<float>(); }

}  // namespace

void HiddenModel::PrepareServing() {
  narrow_.clear();
  if (members() != 1 || !net_.token.weight.is_cpu()) return;
  const auto keep = [&](const at::Tensor& weight) {
    const int64_t in = weight.size(-1);
    narrow_.try_emplace(Data(weight), Data(weight), weight.numel() / in,
                        static_cast<int>(in));
  };
  keep(net_.token.weight);
  keep(net_.token_in.weight);
  keep(net_.output);
  for (const at::Tensor& weight : net_.neighbours) keep(weight);
  for (const NextToken& next : net_.next) keep(next.query.weight);
  for (const LaterUse& later : net_.later) keep(later.linear.weight);
  for (const std::vector<StateInput>* states : {&net_.state, &net_.context}) {
    for (const StateInput& state : *states) keep(state.linear.weight);
  }
  for (const SourceReader& reader : net_.reader) {
    keep(reader.attention.q.weight);
    keep(reader.attention.out.weight);
  }
  for (const ResidualBlock& block : net_.blocks) {
    keep(block.in.weight);
    keep(block.out.weight);
  }
}

void HiddenModel::Dense(const float* x, int rows, const at::Tensor& weight, int64_t first,
                        const float* bias, int out, float* y) const {
  if (const auto it = narrow_.find(Data(weight)); it != narrow_.end()) {
    DenseRows(x, rows, it->second, first, bias, out, y);
    return;
  }
  const auto in = static_cast<int>(weight.size(-1));
  DenseRows(x, rows, in, Data(weight) + first * in, bias, out, y);
}

// The same for one row, added to its logits [leads,E].
void HiddenModel::AddPriorRow(const RoutingWindow& window, int64_t row, int leads,
                              const float* y, float* logits) const {
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
    if (GuessesNext(window, leads)) {
      AddNextTokenCounts(y, leads - after, Data(priors.next_gain)[SourceRow(window)],
                         logits + after * E);
    }
  }
}

// The same as NextTokenCounts for one row y [width], times `gain`, added to `logits`.
void HiddenModel::AddNextTokenCounts(const float* y, int64_t layers, float gain,
                                     float* logits) const {
  const MoeGeometry& g = config_.geometry;
  const NextToken& next = net_.next[0];
  const int V = config_.vocab_size, K = std::min(HiddenNet::kGuesses, V);
  const auto width = static_cast<size_t>(layers * g.num_experts);
  std::vector<float> query(HiddenNet::kTokenWidth), score(static_cast<size_t>(V));
  Dense(y, 1, next.query.weight, 0, Data(next.query.bias), HiddenNet::kTokenWidth,
        query.data());
  Dense(query.data(), 1, net_.token.weight, 0, Data(next.bias), V, score.data());
  std::vector<int> ids(score.size());
  std::iota(ids.begin(), ids.end(), 0);
  std::partial_sort(ids.begin(), ids.begin() + K, ids.end(), [&](int a, int b) {
    return score[static_cast<size_t>(a)] > score[static_cast<size_t>(b)];
  });
  std::vector<float> mixed(width, 0.f);
  const float best = score[static_cast<size_t>(ids[0])];
  float total = 0;
  for (int k = 0; k < K; ++k) {
    const int64_t id = ids[static_cast<size_t>(k)];
    const float weight = std::exp(score[static_cast<size_t>(id)] - best);
    total += weight;
    if (weight < 1e-6f) continue;
    const float* counts =
        Data(net_.priors[0].token) +
        (id * g.num_layers() + g.GlobalLayer(Stack::kDecoder, 0)) * g.num_experts;
    for (size_t i = 0; i < width; ++i) mixed[i] += weight * std::exp(counts[i]);
  }
  for (size_t i = 0; i < width; ++i) logits[i] += gain * std::log(mixed[i] / total);
}

SpeculationOutput HiddenModel::ForwardLast(const RoutingWindow& window) {
  if (NumLeads(window.stack, window.source_layer) == 0 || !Few(window)) {
    return SpeculationModel::ForwardLast(window);
  }
  return FewForward(window, window.token_ids_BT.size(1) - 1);
}

bool HiddenModel::Few(const RoutingWindow& window) const {
  const auto plain = [](const at::Tensor& states) {
    return !states.defined() || (states.is_contiguous() && states.dtype() == at::kFloat);
  };
  const bool contiguous =
      window.token_ids_BT.is_contiguous() && window.experts_BTL.is_contiguous() &&
      plain(window.hidden_BTD) && plain(window.context_BTD) && plain(window.source_BSD) &&
      (!window.source_BSD.defined() || window.source_valid_BS.is_contiguous());
  const bool mixes = !net_.mixer.empty() && window.stack == Stack::kEncoder;
  return contiguous && members() == 1 && net_.attention.empty() && net_.gates.empty() &&
         !mixes && !c10::GradMode::is_enabled() &&
         window.token_ids_BT.numel() <= kFewRows && net_.token.weight.is_cpu();
}

// Adds the embeddings of the experts that row (b, t) may see.
void HiddenModel::AddExperts(const RoutingWindow& window, int64_t row, float* x) const {
  const MoeGeometry& g = config_.geometry;
  const int64_t L = window.experts_BTL.size(2), T = window.token_ids_BT.size(1);
  const int64_t D = config_.width, E = g.num_experts;
  const int64_t* ids = window.experts_BTL.const_data_ptr<int64_t>() + row * L;
  const auto add = [&](const EmbeddingLayer& table, int64_t layer, int64_t id) {
    TORCH_CHECK(id >= 0 && id <= E, "an expert id out of range");
    const int64_t at = id == E ? table.rows() - 1 : layer * E + id;
    AddValues(Data(table.weight) + at * D, static_cast<int>(D), x);
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
  std::vector<float> tokens(rows.size() * HiddenNet::kTokenWidth), part(x->size());
  const std::vector<float> no_bias(size_t(D), 0.f);
  const auto embed = [&](int offset) {
    for (size_t r = 0; r < rows.size(); ++r) {
      const int64_t t = rows[r] % T + offset;
      const int64_t id = t >= 0 && t < T ? ids[rows[r] + offset] : 0;
      TORCH_CHECK(id >= 0 && id < config_.vocab_size, "a token id out of range");
      std::copy_n(Data(net_.token.weight) + id * HiddenNet::kTokenWidth,
                  HiddenNet::kTokenWidth, tokens.data() + r * HiddenNet::kTokenWidth);
    }
  };
  embed(0);
  Dense(tokens.data(), count, net_.token_in.weight, 0, Data(net_.token_in.bias), D,
        x->data());
  for (int i = 0; i < NumNeighbours(window.stack); ++i) {
    embed(OffsetOf(i));
    Dense(tokens.data(), count, net_.neighbours[0], int64_t{i} * D, no_bias.data(), D,
          part.data());
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
  const std::vector<float> zeros(static_cast<size_t>(S), 0.f);
  const auto add_states = [&](const StateInput& in, const at::Tensor& states) {
    std::vector<float> normed(rows.size() * size_t(S)), part(x.size());
    for (size_t r = 0; r < rows.size(); ++r) {
      NormRows(states.defined() ? Data(states) + rows[r] * S : zeros.data(), 1, S,
               Data(in.norm.weight), Data(in.norm.bias), normed.data() + r * size_t(S));
    }
    Dense(normed.data(), count, in.linear.weight, 0, Data(in.linear.bias), D,
          part.data());
    AddValues(part.data(), count * D, x.data());
  };
  if (!net_.state.empty()) {
    if (window.hidden_BTD.defined()) {
      add_states(StateOf(window), window.hidden_BTD);
    } else {
      for (int r = 0; r < count; ++r) {
        AddValues(Data(net_.no_state[0]), D, x.data() + r * D);
      }
    }
    if (window.stack == Stack::kDecoder) {
      add_states(net_.context[0], window.context_BTD);
    }
  }
  for (size_t r = 0; r < rows.size(); ++r) {
    float* row = x.data() + r * size_t(D);
    AddValues(Data(net_.source.weight) + source_row * D, D, row);
    AddExperts(window, rows[r], row);
    if (net_.position.empty()) continue;
    const int64_t place = window.first_token + rows[r] % window.token_ids_BT.size(1);
    AddValues(Data(net_.position[0].weight) + HiddenNet::PositionRow(place) * D, D, row);
  }
  return x;
}

// Adds what each row reads of its sequence's source.
void HiddenModel::ReadSource(const RoutingWindow& window,
                             const std::vector<int64_t>& rows, std::vector<float>* x) {
  const SourceReader& reader = net_.reader[0];
  if (!served_.source_BSD.is_same(window.source_BSD)) {
    const at::Tensor memory = reader.Memory(window.source_BSD);
    served_ = {window.source_BSD, reader.attention.k(memory).transpose(1, 2).contiguous(),
               reader.attention.v(memory).contiguous()};
  }
  const int64_t T = window.token_ids_BT.size(1);
  const int S = static_cast<int>(window.source_BSD.size(1)), W = config_.width;
  std::vector<float> normed(static_cast<size_t>(W)), query(normed), mixed(normed),
      bias(static_cast<size_t>(S)), weight(bias);
  for (size_t r = 0; r < rows.size(); ++r) {
    float* row = x->data() + r * static_cast<size_t>(W);
    const int64_t b = rows[r] / T;
    const bool* real = window.source_valid_BS.const_data_ptr<bool>() + b * S;
    for (int s = 0; s < S; ++s) {
      bias[static_cast<size_t>(s)] = real[s] ? 0.f : static_cast<float>(kMasked);
    }
    NormRows(row, 1, W, Data(reader.query_norm.weight), Data(reader.query_norm.bias),
             normed.data());
    Dense(normed.data(), 1, reader.attention.q.weight, 0, Data(reader.attention.q.bias),
          W, query.data());
    AttendOne(query.data(), W, reader.attention.heads, Data(served_.key_BWS) + b * S * W,
              Data(served_.value_BSW) + b * S * W, bias.data(), S, weight.data(),
              mixed.data());
    Dense(mixed.data(), 1, reader.attention.out.weight, 0,
          Data(reader.attention.out.bias), W, normed.data());
    AddValues(normed.data(), W, row);
  }
}

// The same as Forward without dropout, for a few rows on the CPU: those of the tokens
// from `first` on.
SpeculationOutput HiddenModel::FewForward(const RoutingWindow& window, int64_t first) {
  const std::vector<int64_t> rows = RowsFrom(window, first);
  const int H = NumLeads(window.stack, window.source_layer), D = config_.width;
  const int E = config_.geometry.num_experts, count = static_cast<int>(rows.size());
  const int ff = config_.ff, L = config_.geometry.layers(window.stack);
  std::vector<float> x = FewFeatures(window, rows), y(x.size()),
                     wide(rows.size() * size_t(ff));
  for (const ResidualBlock& block : net_.blocks) {
    NormRows(x.data(), count, D, Data(block.norm.weight), Data(block.norm.bias),
             y.data());
    Dense(y.data(), count, block.in.weight, 0, Data(block.in.bias), ff, wide.data());
    GeluValues(wide.data(), count * ff);
    Dense(wide.data(), count, block.out.weight, 0, Data(block.out.bias), D, y.data());
    AddValues(y.data(), count * D, x.data());
    const bool is_first = &block == &net_.blocks[0];
    if (is_first && !net_.reader.empty() && window.source_BSD.defined()) {
      ReadSource(window, rows, &x);
    }
  }
  NormRows(x.data(), count, D, Data(net_.norm.weight), Data(net_.norm.bias), x.data());
  const int64_t B = window.token_ids_BT.size(0), T = count / B;
  auto logits = at::empty({B, T, H, E}), confidence = at::empty({B, T, H});
  float* guess = confidence.data_ptr<float>();
  for (int r = 0; r < count; ++r) {
    float* row = logits.data_ptr<float>() + int64_t{r} * H * E;
    for (int h = 0; h < H; ++h) {
      std::copy_n(x.data() + size_t(r) * D, D, y.data());
      AddValues(Data(net_.lead.weight) + size_t(h) * D, D, y.data());
      const int64_t target =
          config_.geometry.GlobalLayer(window.stack, (window.source_layer + 1 + h) % L);
      Dense(y.data(), 1, net_.output, target * E, Data(net_.output_bias) + target * E, E,
            row + h * E);
      DenseRows(y.data(), 1, D, Data(net_.confidence.weight), Data(net_.confidence.bias),
                1, guess + int64_t{r} * H + h);
    }
    if (!net_.priors.empty()) {
      AddPriorRow(window, rows[size_t(r)], H, x.data() + size_t(r) * D, row);
    }
  }
  for (int i = 0; i < count * H; ++i) guess[i] = 1 / (1 + std::exp(-guess[i]));
  SpeculationOutput out{logits, confidence, {}};
  if (!SaysLaterUse(window)) return out;
  const LinearLayer& later = net_.later[0].linear;
  out.later_BTLE = at::empty({B, T, L, E});
  Dense(x.data(), count, later.weight, 0, Data(later.bias), L * E,
        out.later_BTLE.data_ptr<float>());
  return out;
}

}  // namespace routecast
