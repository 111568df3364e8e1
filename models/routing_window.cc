#include "models/routing_window.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>

#include "common/errors.h"

namespace routecast {
namespace {

const RoutingSpan& SpanOf(const RoutingTrace& trace, Stack stack) {
  return stack == Stack::kEncoder ? trace.encoder : trace.decoder;
}

void CheckSource(const RoutingSpan& span, Stack stack, int source_layer) {
  if (source_layer < -1 || source_layer >= std::max(span.num_layers, 1)) {
    throw std::logic_error("no source layer " + std::to_string(source_layer) + " in a " +
                           StackName(stack) + " of " + std::to_string(span.num_layers));
  }
}

// One plane of states, [1,T,D] float32.
at::Tensor StatesOf(const RoutingSpan& span, const uint16_t* plane) {
  auto bits = at::empty({1, span.num_tokens, span.hidden_width},
                        at::TensorOptions(at::kBFloat16));
  std::memcpy(bits.data_ptr(), plane, bits.nbytes());
  return bits.to(at::kFloat);
}

// Router inputs of one layer.
at::Tensor HiddenOf(const RoutingSpan& span, int layer) {
  const size_t plane = static_cast<size_t>(span.num_tokens) * span.hidden_width;
  return StatesOf(span, span.hidden.data() + layer * plane);
}

// Right-pads dimension 1 to `tokens` with `value`.
at::Tensor PadTokens(const at::Tensor& x, int64_t tokens, double value) {
  if (x.size(1) == tokens) return x;
  auto sizes = x.sizes().vec();
  sizes[1] = tokens - x.size(1);
  return at::cat({x, at::full(sizes, value, x.options())}, 1);
}

}  // namespace

namespace {

// The place of a lead's target: its layer in the stack, and how many tokens later.
struct TargetPlace {
  int layer = 0, shift = 0;
};
std::optional<TargetPlace> TargetPlaceOf(const RoutingSpan& span, Stack stack,
                                         int source_layer, int lead) {
  CheckSource(span, stack, source_layer);
  if (lead < 1) throw std::logic_error("leads start at 1");
  TargetPlace place{source_layer + lead, 0};
  if (stack == Stack::kDecoder && place.layer >= span.num_layers) {
    place.layer -= span.num_layers;
    place.shift = 1;
  }
  if (place.layer >= span.num_layers || span.expert_ids.empty()) return std::nullopt;
  return place;
}

// [1,T,L,K-1], unknown past the first `known` layers.
at::Tensor OthersOf(const RoutingSpan& span, int known, int64_t unknown) {
  const int64_t T = span.num_tokens, L = span.num_layers, K = span.top_k;
  auto others = at::full({1, T, L, K - 1}, unknown, at::kLong);
  int64_t* out = others.data_ptr<int64_t>();
  for (int64_t l = 0; l < known; ++l) {
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t k = 1; k < K; ++k) {
        out[(t * L + l) * (K - 1) + k - 1] =
            span.topk_ids[static_cast<size_t>((l * T + t) * K + k)];
      }
    }
  }
  return others;
}

}  // namespace

at::Tensor WindowLabels(const RoutingTrace& trace, Stack stack, int source_layer,
                        int lead) {
  const RoutingSpan& span = SpanOf(trace, stack);
  const int tokens = span.num_tokens;
  auto labels = at::full({tokens}, -100, at::kLong);
  const auto place = TargetPlaceOf(span, stack, source_layer, lead);
  if (!place) return labels;
  int64_t* out = labels.data_ptr<int64_t>();
  for (int t = 0; t + place->shift < tokens; ++t) {
    const size_t at = static_cast<size_t>(place->layer) * tokens + t + place->shift;
    if (!span.dropped.empty() && span.dropped[at]) continue;
    out[t] = span.expert_ids[at];
  }
  return labels;
}

at::Tensor WindowLabelSets(const RoutingTrace& trace, Stack stack, int source_layer,
                           int lead, int experts_per_token) {
  const RoutingSpan& span = SpanOf(trace, stack);
  const int64_t K = experts_per_token;
  const auto first = WindowLabels(trace, stack, source_layer, lead);
  if (K == 1) return first.unsqueeze(1);
  auto labels = at::full({first.size(0), K}, -100, at::kLong);
  const auto place = TargetPlaceOf(span, stack, source_layer, lead);
  if (!place) return labels;
  if (span.top_k != K || span.topk_ids.empty()) {
    throw DataError(ErrorText(
        "sequence " + std::to_string(trace.sequence_id) + " does not hold every expert",
        std::to_string(span.top_k) + " of " + std::to_string(K) + " a token are recorded",
        "import or record the store again, with all of them"));
  }
  int64_t* out = labels.data_ptr<int64_t>();
  for (int64_t t = 0; t + place->shift < first.size(0); ++t) {
    if (first.data_ptr<int64_t>()[t] < 0) continue;
    const int64_t at = int64_t{place->layer} * span.num_tokens + t + place->shift;
    for (int64_t k = 0; k < K; ++k) {
      out[t * K + k] = span.topk_ids[static_cast<size_t>(at * K + k)];
    }
  }
  return labels;
}

RoutingWindow WindowOf(const RoutingTrace& trace, Stack stack, int source_layer,
                       int num_experts, int experts_per_token) {
  const RoutingSpan& span = SpanOf(trace, stack);
  CheckSource(span, stack, source_layer);
  const int tokens = span.num_tokens, layers = span.num_layers;
  RoutingWindow window;
  window.stack = stack;
  window.source_layer = source_layer;
  window.num_layers = layers;
  window.num_experts = num_experts;
  window.token_ids_BT = at::zeros({1, tokens}, at::kLong);
  window.valid_BT = at::ones({1, tokens}, at::kBool);
  window.experts_BTL = at::full({1, tokens, layers}, num_experts, at::kLong);
  int64_t* ids = window.token_ids_BT.data_ptr<int64_t>();
  std::copy(span.token_ids.begin(), span.token_ids.end(), ids);
  int64_t* experts = window.experts_BTL.data_ptr<int64_t>();
  const int known = stack == Stack::kEncoder ? source_layer + 1 : layers;
  for (int l = 0; l < known && !span.expert_ids.empty(); ++l) {
    for (int t = 0; t < tokens; ++t) {
      experts[static_cast<size_t>(t) * layers + l] =
          span.expert_ids[static_cast<size_t>(l) * tokens + t];
    }
  }
  if (experts_per_token > 1 && span.top_k == experts_per_token &&
      !span.topk_ids.empty()) {
    window.others_BTLK = OthersOf(span, known, num_experts);
  }
  if (span.hidden_width > 0 && !span.hidden.empty()) {
    if (source_layer >= 0) window.hidden_BTD = HiddenOf(span, source_layer);
    if (stack == Stack::kDecoder && layers > 0 && tokens > 0) {
      const at::Tensor last = HiddenOf(span, layers - 1);
      window.context_BTD = at::cat(
          {at::zeros_like(last.narrow(1, 0, 1)), last.narrow(1, 0, tokens - 1)}, 1);
    }
    const RoutingSpan& source = trace.encoder;
    if (stack == Stack::kDecoder && source.num_layers > 0 && source.num_tokens > 0 &&
        source.hidden_width == span.hidden_width && !source.hidden.empty()) {
      window.source_BSD = HiddenOf(source, source.num_layers - 1);
      window.source_valid_BS = at::ones({1, source.num_tokens}, at::kBool);
    }
  }
  return window;
}

at::Tensor OutputOf(const RoutingTrace& trace) {
  if (trace.decoder.output.empty()) return {};
  return StatesOf(trace.decoder, trace.decoder.output.data());
}

RoutingWindow BatchWindows(const std::vector<RoutingWindow>& windows) {
  if (windows.empty()) throw std::logic_error("a batch of no windows");
  RoutingWindow batch = windows[0];
  int64_t tokens = 0, source_tokens = 0;
  bool hidden = true, context = true, source = true, further = true;
  for (const RoutingWindow& w : windows) {
    if (w.stack != batch.stack || w.source_layer != batch.source_layer ||
        w.num_layers != batch.num_layers || w.num_experts != batch.num_experts) {
      throw std::logic_error("windows of different sources in one batch");
    }
    tokens = std::max(tokens, w.token_ids_BT.size(1));
    further = further && w.others_BTLK.defined();
    hidden = hidden && w.hidden_BTD.defined();
    context = context && w.context_BTD.defined();
    source = source && w.source_BSD.defined();
    if (source) source_tokens = std::max(source_tokens, w.source_BSD.size(1));
  }
  std::vector<at::Tensor> ids, valid, experts, others, states, contexts, sources,
      source_valid;
  for (const RoutingWindow& w : windows) {
    ids.push_back(PadTokens(w.token_ids_BT, tokens, 0));
    valid.push_back(PadTokens(w.valid_BT, tokens, 0));
    experts.push_back(PadTokens(w.experts_BTL, tokens, w.num_experts));
    if (further) others.push_back(PadTokens(w.others_BTLK, tokens, w.num_experts));
    if (hidden) states.push_back(PadTokens(w.hidden_BTD, tokens, 0));
    if (context) contexts.push_back(PadTokens(w.context_BTD, tokens, 0));
    if (!source) continue;
    sources.push_back(PadTokens(w.source_BSD, source_tokens, 0));
    source_valid.push_back(PadTokens(w.source_valid_BS, source_tokens, 0));
  }
  batch.token_ids_BT = at::cat(ids);
  batch.valid_BT = at::cat(valid);
  batch.experts_BTL = at::cat(experts);
  batch.others_BTLK = further ? at::cat(others) : at::Tensor();
  batch.hidden_BTD = hidden ? at::cat(states) : at::Tensor();
  batch.context_BTD = context ? at::cat(contexts) : at::Tensor();
  batch.source_BSD = source ? at::cat(sources) : at::Tensor();
  batch.source_valid_BS = source ? at::cat(source_valid) : at::Tensor();
  return batch;
}

}  // namespace routecast
