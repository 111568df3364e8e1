// Traces with routing worth learning, made from nothing but a seed: a token's state x
// follows from its id and its neighbour's, every layer's router is a random matrix, and
// the recorded expert is its argmax over the state that is stored. Not a mock: the same
// argmax that a Switch router takes.
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <vector>

#include "common/random.h"
#include "common/routing.h"
#include "models/checkpoint.h"

namespace routecast {

struct SyntheticTraces {
  MoeGeometry geometry;
  std::vector<RoutingTrace> traces;
  std::vector<RouterWeights> routers;
};

class TraceSynthesizer {
 public:
  TraceSynthesizer(int layers, int experts, int width, int vocabulary, uint64_t seed)
      : vocabulary_(vocabulary), seed_(seed) {
    geometry_ = {layers, layers, experts, 1, width};
    at::manual_seed(static_cast<int64_t>(seed));
    ids_ = at::randn({vocabulary, width});
    const at::Tensor base = at::randn({experts, width});
    for (int l = 0; l < geometry_.num_layers(); ++l) {
      drift_.push_back(at::randn({width, width}) * (0.7 / std::sqrt(double(width))));
      routers_.push_back(
          {base + 0.7 * at::randn({experts, width}), {}, at::rand({width}) + 0.5});
    }
  }

  // `top_k` > 0: the router's so many likeliest are recorded, too. `attention_heads` > 0:
  // summaries of so many heads beside router inputs, drawn, of places that may be seen.
  SyntheticTraces Make(int sequences, int shortest, int longest, bool every_hidden,
                       int top_k = 0, int attention_heads = 0) {
    top_k_ = top_k;
    SyntheticTraces made{geometry_, {}, routers_};
    for (int s = 0; s < sequences; ++s) {
      const auto key = static_cast<uint64_t>(s);
      const bool hidden = every_hidden || s % 2 == 0;
      RoutingTrace trace;
      trace.sequence_id = key * 3 + 1;
      trace.document_id = key / 2;
      trace.group_id = Mix(seed_, key / 2);
      const auto range = static_cast<uint64_t>(longest - shortest + 1);
      trace.encoder = Span(Stack::kEncoder, Mix(seed_, key, 1),
                           shortest + int(ToRange(Mix(seed_, key, 2), range)), hidden);
      trace.decoder = Span(Stack::kDecoder, Mix(seed_, key, 3),
                           shortest + int(ToRange(Mix(seed_, key, 4), range)), hidden);
      if (hidden && attention_heads > 0) {
        const int source = trace.encoder.num_tokens;
        RecordAttention(attention_heads, false, source, Mix(seed_, key, 5),
                        &trace.encoder);
        RecordAttention(attention_heads, true, source, Mix(seed_, key, 6),
                        &trace.decoder);
      }
      made.traces.push_back(std::move(trace));
    }
    return made;
  }

 private:
  static void RecordAttention(int heads, bool decoder, int source_tokens, uint64_t key,
                              RoutingSpan* span) {
    span->attention_heads = heads * (decoder ? 2 : 1);
    const auto count = static_cast<uint64_t>(span->num_layers) * span->num_tokens *
                       static_cast<uint64_t>(span->attention_heads);
    for (uint64_t i = 0; i < count; ++i) {
      span->attention_entropy.push_back(static_cast<float>(2 * ToUnit(Mix(key, i))));
      const auto head = static_cast<int>(i % uint64_t(span->attention_heads));
      const int token =
          static_cast<int>(i / uint64_t(span->attention_heads)) % span->num_tokens;
      const int seen = head >= heads ? source_tokens
                       : decoder     ? token + 1
                                     : span->num_tokens;
      for (uint64_t k = 0; k < kStrongestKeys; ++k) {
        const auto at = ToRange(Mix(key, i, k), static_cast<uint64_t>(seen));
        span->attention_keys.push_back(
            static_cast<int>(k) < seen ? static_cast<uint16_t>(at) : kNoKey);
      }
    }
  }
  void RecordTopK(const at::Tensor& logits, RoutingSpan* span) const {
    if (top_k_ == 0) return;
    span->top_k = top_k_;
    const auto [probs, ids] = logits.softmax(1).topk(top_k_, 1);
    const at::Tensor flat_ids = ids.contiguous(), flat_probs = probs.contiguous();
    for (int64_t i = 0; i < flat_ids.numel(); ++i) {
      span->topk_ids.push_back(static_cast<uint16_t>(flat_ids.data_ptr<int64_t>()[i]));
      span->topk_probs.push_back(flat_probs.data_ptr<float>()[i]);
    }
  }
  RoutingSpan Span(Stack stack, uint64_t key, int tokens, bool hidden) const {
    RoutingSpan span;
    span.num_tokens = tokens;
    span.num_layers = geometry_.layers(stack);
    std::vector<int64_t> ids;
    for (int t = 0; t < tokens; ++t) {
      ids.push_back(static_cast<int64_t>(ToRange(Mix(key, static_cast<uint64_t>(t)),
                                                 static_cast<uint64_t>(vocabulary_))));
      span.token_ids.push_back(static_cast<uint32_t>(ids.back()));
    }
    at::Tensor x = ids_.index_select(0, at::tensor(ids, at::kLong));
    x = x +
        0.5 * at::cat({at::zeros_like(x.narrow(0, 0, 1)), x.narrow(0, 0, tokens - 1)});
    if (hidden) span.hidden_width = geometry_.d_model;
    for (int l = 0; l < span.num_layers; ++l) {
      const auto global = static_cast<size_t>(geometry_.GlobalLayer(stack, l));
      x = x + at::tanh(at::matmul(x, drift_[global]));
      const at::Tensor norm = x * at::rsqrt(x.pow(2).mean(1, true) + 1e-6);
      const at::Tensor input =
          (norm * routers_[global].norm_gain_D).to(at::kBFloat16).to(at::kFloat);
      const at::Tensor logits = at::matmul(input, routers_[global].weight_ED.t());
      const at::Tensor chosen = logits.argmax(1).contiguous();
      RecordTopK(logits, &span);
      for (int t = 0; t < tokens; ++t) {
        span.expert_ids.push_back(static_cast<uint16_t>(chosen.data_ptr<int64_t>()[t]));
        span.gate_probs.push_back(0.5f);
        span.margins.push_back(0.25f);
        span.dropped.push_back(Mix(key, uint64_t(l), uint64_t(t)) % 50 == 0);
      }
      const at::Tensor flat = input.contiguous();
      for (int64_t i = 0; hidden && i < flat.numel(); ++i) {
        span.hidden.push_back(FloatToBf16(flat.data_ptr<float>()[i]));
      }
    }
    return span;
  }

  int vocabulary_;
  int top_k_ = 0;
  uint64_t seed_;
  MoeGeometry geometry_;
  at::Tensor ids_;
  std::vector<at::Tensor> drift_;
  std::vector<RouterWeights> routers_;
};

}  // namespace routecast
