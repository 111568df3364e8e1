// The `hidden` kind's net and its two ways of computing it: tensor calls (training,
// hidden_model.cc) and plain loops over a few rows (serving, hidden_serving.cc).
// V vocabulary, L MoE layers of the decoder, E experts, D router input width.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <string>
#include <unordered_map>
#include <vector>

#include "models/small_math.h"
#include "models/token_inputs.h"
#include "models/trunk_model.h"

namespace routecast {

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

// Attention summaries of a source layer: entropies by head, and by head the mean of the
// embeddings of the tokens that it looked at most.
struct AttentionInput {
  AttentionInput(ParameterMaker* make, const std::string& name, int64_t heads,
                 int64_t token_width, int64_t width)
      : entropy(make, name + ".entropy", heads, width),
        tokens(make, name + ".tokens", heads * token_width, width) {}
  LinearLayer entropy, tokens;
};

// Log-probabilities of the train part's counts, added to the logits with a gain by
// source: the model starts as good as the counts and learns what they miss.
struct Priors {
  at::Tensor token;   // [V,layers * E]: of the experts, given the own token's id
  at::Tensor markov;  // [L * (E + 1),L * E], L of the decoder: of the experts at each
                      // lead from (source layer, its expert); zeros where that is unknown
  at::Tensor gain;    // [layers + 2], parameter; of each member
  // [layers + 2], parameter: of the counts of the next token, mixed over the guesses at
  // its id; defined where those are a feature
  at::Tensor next_gain;
};

// What the decoder reads of the encoder: attention over its router inputs.
struct SourceReader {
  SourceReader(ParameterMaker* make, int64_t hidden_width, int64_t width, int heads)
      : norm(make, "source.norm", hidden_width),
        linear(make, "source.linear", hidden_width, width),
        query_norm(make, "source.query_norm", width),
        attention(make, "source.attention", width, heads) {}
  at::Tensor Memory(const at::Tensor& source_BSD) const {
    return linear(norm(source_BSD));
  }
  NormLayer norm;
  LinearLayer linear;
  NormLayer query_norm;
  AttentionLayer attention;
};

// What a token of the encoder reads of the others: attention with a learnt bias by
// distance, all beyond kReach alike.
struct TokenMixer {
  static constexpr int kReach = 32;
  TokenMixer(ParameterMaker* make, int64_t width, int heads)
      : norm(make, "mixer.norm", width),
        attention(make, "mixer.attention", width, heads),
        bias(make->Constant("mixer.bias", {heads, 2 * kReach + 1}, 0)) {}
  // x [B,T,width], valid_BT: true = a token.
  at::Tensor operator()(const at::Tensor& x_BTD, const at::Tensor& valid_BT) const;
  NormLayer norm;
  AttentionLayer attention;
  at::Tensor bias;  // [heads,2 * kReach + 1], of each member; from kReach before to after
};

// A guess at the decoder's next token, whose routing follows its id: scores against the
// token embedding.
struct NextToken {
  NextToken(ParameterMaker* make, int64_t width, int64_t token_width, int64_t vocab_size)
      : query(make, "next_token.query", width, token_width),
        bias(make->Constant("next_token.bias", {vocab_size}, 0)) {}
  LinearLayer query;
  at::Tensor bias;  // [V]
};

// How much each expert of the decoder will be used by the tokens after this one, of
// which each counts kDiscount times what the one before it does: who is to stay in a
// cache, beyond the reach of the leads.
struct LaterUse {
  static constexpr double kDiscount = 0.85;
  static constexpr double kWeight = 0.1;  // of its cross-entropy in the loss
  LaterUse(ParameterMaker* make, int64_t width, int64_t keys)
      : linear(make, "later_use", width, keys) {}
  LinearLayer linear;  // to [decoder layers * E]
};

struct HiddenNet {
  static constexpr int kTokenWidth = 64;
  static constexpr int kGuesses = 16;    // likeliest next tokens whose counts are mixed
  static constexpr int kPositions = 32;  // rows for places in a sequence
  HiddenNet(const SpeculationConfig& c, ParameterMaker* make);
  // A row a place up to 16, then four a doubling; the last one is shared from 215 on.
  static int64_t PositionRow(int64_t place);
  // Source layers of both stacks; nothing lies ahead of the encoder's last one.
  static int NumStates(const MoeGeometry& g) {
    return std::max(0, g.encoder_layers - 1) + g.decoder_layers;
  }
  // The source layer's router input, by source layer, and the context; none where they
  // are no features.
  std::vector<StateInput> state, context;
  std::vector<at::Tensor> no_state;  // [width], with `state`: in place of an unknown one
  std::vector<AttentionInput> attention;  // by source layer, as `state`; or none
  std::vector<LinearLayer> gates;    // of the router's likeliest experts; one or none
  std::vector<SourceReader> reader;  // one or none; read after the first block
  std::vector<TokenMixer> mixer;     // the same of the encoder
  EmbeddingLayer token;              // V rows of kTokenWidth
  LinearLayer token_in;
  std::vector<Priors> priors;   // one or none
  std::vector<NextToken> next;  // one or none; one only where priors are
  // [2 n,width,kTokenWidth]: of the tokens n..1 to the left, then 1..n to the right,
  // which the decoder does not see. None where neighbours are not a feature.
  std::vector<at::Tensor> neighbours;
  std::vector<EmbeddingLayer> position;  // one or none
  EmbeddingLayer source;         // layers + 2 rows: each stack's sources from -1 on
  EmbeddingLayer own, previous;  // layers * E + 1 rows; the last one is "unknown"
  EmbeddingLayer lead;           // a row a lead
  std::vector<ResidualBlock> blocks;
  NormLayer norm;
  at::Tensor output, output_bias;  // [layers,E,width], [layers,E]: by target layer
  LinearLayer confidence;
  std::vector<LaterUse> later;  // one or none
};

class HiddenModel final : public TrunkModel {
 public:
  HiddenModel(const SpeculationConfig& config, const ModelSeeds& seeds)
      : TrunkModel(config, static_cast<int64_t>(seeds.size())),
        make_(&parameters_, seeds),
        net_(config, &make_) {
    if (config.priors) AddPriors();
  }
  void FitPriors(const BaselineTables& tables) override;
  int history_tokens() const override { return 1 + std::max(1, config_.neighbours); }
  bool keeps_tokens() const override { return false; }  // few are seen, and all at once
  SpeculationOutput ForwardLast(const RoutingWindow& window) override;
  void PrepareServing() override;

 protected:
  SpeculationOutput Compute(const RoutingWindow& window, KeyedDropout* dropout,
                            TokenMemory*) override;

 private:
  void AddPriors();
  int SourceRow(const RoutingWindow& window) const {
    return window.source_layer + 1 +
           (window.stack == Stack::kEncoder ? 0 : config_.geometry.encoder_layers + 1);
  }
  // Among the source layers of both stacks (NumStates).
  size_t StateIndex(const RoutingWindow& window) const {
    const int before = window.stack == Stack::kEncoder
                           ? 0
                           : std::max(0, config_.geometry.encoder_layers - 1);
    return static_cast<size_t>(before + window.source_layer);
  }
  const StateInput& StateOf(const RoutingWindow& window) const {
    return net_.state[StateIndex(window)];
  }
  // Leads whose targets are layers of the same token.
  int64_t NumSameToken(const RoutingWindow& window) const {
    return config_.geometry.layers(window.stack) - 1 - window.source_layer;
  }
  // `next_BTV`: scores of the next token, undefined where there are none.
  at::Tensor PriorLogits(const RoutingWindow& window, int64_t leads,
                         const at::Tensor& next_BTV) const;
  at::Tensor NextTokenCounts(const at::Tensor& next_BTV, int64_t layers) const;
  bool GuessesNext(const RoutingWindow& window, int64_t leads) const {
    return !net_.next.empty() && leads > NumSameToken(window);
  }
  void AddPriorRow(const RoutingWindow& window, int64_t row, int leads, const float* y,
                   float* logits) const;
  void AddNextTokenCounts(const float* y, int64_t layers, float gain,
                          float* logits) const;
  int NumNeighbours(Stack stack) const {
    return (stack == Stack::kEncoder ? 2 : 1) * config_.neighbours;
  }
  // Of neighbour i, from the own token; negative = left.
  int OffsetOf(int i) const {
    return i < config_.neighbours ? i - config_.neighbours : i - config_.neighbours + 1;
  }
  at::Tensor Features(const RoutingWindow& window) const;
  at::Tensor Attended(const RoutingWindow& window) const;
  at::Tensor Experts(const EmbeddingLayer& table, const at::Tensor& ids_BTL,
                     int first_layer) const;
  at::Tensor Logits(const at::Tensor& z_HND, const RoutingWindow& window) const;
  // Before a decoder's first layer, where it is asked.
  bool SaysLaterUse(const RoutingWindow& window) const {
    return !net_.later.empty() && window.stack == Stack::kDecoder &&
           window.source_layer == -1;
  }
  at::Tensor LaterUseLoss(const at::Tensor& later_BTLE,
                          const RoutingWindow& window) const;
  bool Few(const RoutingWindow& window) const;
  // Of the window's tokens from `first` on, sequence by sequence: b * T + t.
  static std::vector<int64_t> RowsFrom(const RoutingWindow& window, int64_t first);
  void AddTokens(const RoutingWindow& window, const std::vector<int64_t>& rows,
                 std::vector<float>* x) const;
  std::vector<float> FewFeatures(const RoutingWindow& window,
                                 const std::vector<int64_t>& rows) const;
  void AddExperts(const RoutingWindow& window, int64_t row, float* x) const;
  void ReadSource(const RoutingWindow& window, const std::vector<int64_t>& rows,
                  std::vector<float>* x);
  // y[rows,out] = x times the rows [first, first + out) of `weight`, all but its last
  // dimension taken as one, plus bias.
  void Dense(const float* x, int rows, const at::Tensor& weight, int64_t first,
             const float* bias, int out, float* y) const;
  SpeculationOutput FewForward(const RoutingWindow& window, int64_t first);

  ParameterMaker make_;
  HiddenNet net_;
  // Keys and values of the source that was served last: one for all steps of a sequence.
  struct ServedSource {
    at::Tensor source_BSD, key_BWS, value_BSW;
  };
  ServedSource served_;
  // By a matrix' first weight; empty until PrepareServing.
  std::unordered_map<const float*, NarrowMatrix> narrow_;
};

}  // namespace routecast
