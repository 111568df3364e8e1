#include "models/routing_window.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>

#include "common/errors.h"
#include "common/wide_loops.h"

namespace routecast {
namespace {

using Traces = std::vector<const RoutingTrace*>;

constexpr int64_t kIgnore = -100;

const RoutingSpan& SpanOf(const RoutingTrace& trace, Stack stack) {
  return stack == Stack::kEncoder ? trace.encoder : trace.decoder;
}

void CheckSource(const RoutingSpan& span, Stack stack, int source_layer) {
  if (source_layer < -1 || source_layer >= std::max(span.num_layers, 1)) {
    throw std::logic_error("no source layer " + std::to_string(source_layer) + " in a " +
                           StackName(stack) + " of " + std::to_string(span.num_layers));
  }
}

// at::full runs in parallel where it is large.
template <typename T>
at::Tensor Filled(at::IntArrayRef sizes, T value) {
  at::Tensor x = at::empty(sizes, c10::CppTypeToScalarType<T>::value);
  std::fill_n(x.data_ptr<T>(), x.numel(), value);
  return x;
}

int64_t LongestOf(const Traces& traces, Stack stack) {
  int64_t tokens = 0;
  for (const RoutingTrace* trace : traces) {
    tokens = std::max<int64_t>(tokens, SpanOf(*trace, stack).num_tokens);
  }
  return tokens;
}

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

void RequireChoices(const RoutingTrace& trace, const RoutingSpan& span, int64_t choices) {
  if (span.top_k == choices && !span.topk_ids.empty()) return;
  throw DataError(ErrorText(
      "sequence " + std::to_string(trace.sequence_id) + " does not hold every expert",
      std::to_string(span.top_k) + " of " + std::to_string(choices) +
          " a token are recorded",
      "import or record the store again, with all of them"));
}

// Calls put(token, place in the planes) for every token that has a label at this lead.
template <typename Put>
void EachLabel(const RoutingSpan& span, Stack stack, int source_layer, int lead,
               const Put& put) {
  const auto place = TargetPlaceOf(span, stack, source_layer, lead);
  if (!place) return;
  const int64_t tokens = span.num_tokens;
  for (int64_t t = 0; t + place->shift < tokens; ++t) {
    const auto at = static_cast<size_t>(place->layer * tokens + t + place->shift);
    if (span.dropped.empty() || !span.dropped[at]) put(t, at);
  }
}

}  // namespace

WindowTargets WindowTargetsOf(const Traces& traces, Stack stack, int source_layer,
                              int leads, int experts_per_token) {
  const auto B = static_cast<int64_t>(traces.size());
  const int64_t T = LongestOf(traces, stack), H = leads, K = experts_per_token;
  WindowTargets targets;
  targets.labels_BTH = Filled<int64_t>({B, T, H}, kIgnore);
  if (K > 1) targets.others_BTHK = Filled<int64_t>({B, T, H, K - 1}, kIgnore);
  int64_t* labels = targets.labels_BTH.data_ptr<int64_t>();
  int64_t* others = K > 1 ? targets.others_BTHK.data_ptr<int64_t>() : nullptr;
  for (int64_t b = 0; b < B; ++b) {
    const RoutingTrace& trace = *traces[static_cast<size_t>(b)];
    const RoutingSpan& span = SpanOf(trace, stack);
    for (int64_t h = 0; h < H; ++h) {
      if (K > 1 && TargetPlaceOf(span, stack, source_layer, static_cast<int>(h) + 1)) {
        RequireChoices(trace, span, K);
      }
      EachLabel(span, stack, source_layer, static_cast<int>(h) + 1,
                [&](int64_t t, size_t at) {
                  const int64_t row = (b * T + t) * H + h;
                  labels[row] = span.expert_ids[at];
                  ++targets.num_labels;
                  if (K == 1) return;
                  const auto* chosen = &span.topk_ids[at * static_cast<size_t>(K)];
                  labels[row] = chosen[0];
                  std::copy_n(chosen + 1, K - 1, others + row * (K - 1));
                });
    }
  }
  return targets;
}

at::Tensor WindowLabels(const RoutingTrace& trace, Stack stack, int source_layer,
                        int lead) {
  const RoutingSpan& span = SpanOf(trace, stack);
  auto labels = Filled<int64_t>({span.num_tokens}, kIgnore);
  int64_t* out = labels.data_ptr<int64_t>();
  EachLabel(span, stack, source_layer, lead,
            [&](int64_t t, size_t at) { out[t] = span.expert_ids[at]; });
  return labels;
}

namespace {

ROUTECAST_WIDE void Widen(const uint16_t* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
    std::memcpy(to + i, &bits, sizeof bits);
  }
}

// Copies rows of bf16 bits as float32, zeros after them up to `rows`.
float* PutStates(const uint16_t* from, int64_t count, int64_t rows, int64_t width,
                 float* to) {
  Widen(from, count * width, to);
  return std::fill_n(to + count * width, (rows - count) * width, 0.f);
}

bool HasStates(const RoutingSpan& span) {
  return span.hidden_width > 0 && !span.hidden.empty();
}
const uint16_t* PlaneOf(const RoutingSpan& span, int layer) {
  return span.hidden.data() +
         static_cast<size_t>(layer) * span.num_tokens * span.hidden_width;
}

bool HasContext(const RoutingTrace& trace) {
  const RoutingSpan& span = trace.decoder;
  return HasStates(span) && span.num_layers > 0 && span.num_tokens > 0;
}
bool HasSource(const RoutingTrace& trace) {
  const RoutingSpan& source = trace.encoder;
  return HasStates(trace.decoder) && HasStates(source) && source.num_layers > 0 &&
         source.num_tokens > 0 && source.hidden_width == trace.decoder.hidden_width;
}

template <typename Has>
bool All(const Traces& traces, const Has& has) {
  return std::all_of(traces.begin(), traces.end(),
                     [&](const RoutingTrace* trace) { return has(*trace); });
}

void AddStates(const Traces& traces, RoutingWindow* window) {
  const bool decoder = window->stack == Stack::kDecoder;
  const int source = window->source_layer;
  const auto B = static_cast<int64_t>(traces.size());
  const int64_t T = window->token_ids_BT.size(1);
  const int64_t D = SpanOf(*traces[0], window->stack).hidden_width;
  const auto span_of = [&](const RoutingTrace& t) -> const RoutingSpan& {
    return SpanOf(t, window->stack);
  };
  if (source >= 0 && All(traces, [&](const auto& t) { return HasStates(span_of(t)); })) {
    window->hidden_BTD = at::empty({B, T, D}, at::kFloat);
    float* to = window->hidden_BTD.data_ptr<float>();
    for (const RoutingTrace* trace : traces) {
      const RoutingSpan& span = span_of(*trace);
      to = PutStates(PlaneOf(span, source), span.num_tokens, T, D, to);
    }
  }
  if (decoder && All(traces, HasContext)) {
    window->context_BTD = at::empty({B, T, D}, at::kFloat);
    float* to = window->context_BTD.data_ptr<float>();
    for (const RoutingTrace* trace : traces) {
      const RoutingSpan& span = trace->decoder;
      to = std::fill_n(to, D, 0.f);  // nothing is before the first token
      to = PutStates(PlaneOf(span, span.num_layers - 1), span.num_tokens - 1, T - 1, D,
                     to);
    }
  }
  if (decoder && All(traces, HasSource)) {
    const int64_t S = LongestOf(traces, Stack::kEncoder);
    window->source_BSD = at::empty({B, S, D}, at::kFloat);
    window->source_valid_BS = Filled<bool>({B, S}, false);
    float* to = window->source_BSD.data_ptr<float>();
    bool* valid = window->source_valid_BS.data_ptr<bool>();
    for (const RoutingTrace* trace : traces) {
      const RoutingSpan& span = trace->encoder;
      to = PutStates(PlaneOf(span, span.num_layers - 1), span.num_tokens, S, D, to);
      std::fill_n(valid, span.num_tokens, true);
      valid += S;
    }
  }
}

// What the tokens looked at in the block of the source layer.
void AddAttention(const Traces& traces, RoutingWindow* window) {
  const Stack stack = window->stack;
  const int source = window->source_layer;
  const int64_t A = SpanOf(*traces[0], stack).attention_heads;
  const bool all = source >= 0 && A > 0 && All(traces, [&](const RoutingTrace& trace) {
                     const RoutingSpan& span = SpanOf(trace, stack);
                     return span.attention_heads == A && !span.attention_keys.empty();
                   });
  if (!all) return;
  const bool decoder = stack == Stack::kDecoder;
  const int64_t own_heads = decoder ? A / 2 : A, K = kStrongestKeys;
  const auto B = static_cast<int64_t>(traces.size());
  const int64_t T = window->token_ids_BT.size(1);
  window->attention_entropy_BTA = Filled<float>({B, T, A}, 0);
  window->attended_ids_BTAK = Filled<int64_t>({B, T, A, K}, -1);
  for (int64_t b = 0; b < B; ++b) {
    const RoutingTrace& trace = *traces[static_cast<size_t>(b)];
    const RoutingSpan& span = SpanOf(trace, stack);
    const int64_t tokens = span.num_tokens, first = source * tokens * A;
    std::copy_n(span.attention_entropy.begin() + first, tokens * A,
                window->attention_entropy_BTA.data_ptr<float>() + b * T * A);
    const uint16_t* keys = span.attention_keys.data() + first * K;
    int64_t* ids = window->attended_ids_BTAK.data_ptr<int64_t>() + b * T * A * K;
    for (int64_t i = 0; i < tokens * A * K; ++i) {
      const bool cross = i / K % A >= own_heads;
      const std::vector<uint32_t>& of = cross ? trace.encoder.token_ids : span.token_ids;
      const auto there = static_cast<int64_t>(of.size());
      const int64_t known = decoder && !cross ? std::min(i / (A * K) + 1, there) : there;
      if (keys[i] != kNoKey && keys[i] < known) ids[i] = of[keys[i]];
    }
  }
}

// The further choices of the first `known` layers.
void AddOthers(const Traces& traces, int known, int64_t K, RoutingWindow* window) {
  const bool all = All(traces, [&](const RoutingTrace& trace) {
    const RoutingSpan& span = SpanOf(trace, window->stack);
    return span.top_k == K && !span.topk_ids.empty();
  });
  if (!all) return;
  const auto B = static_cast<int64_t>(traces.size());
  const int64_t T = window->token_ids_BT.size(1), L = window->num_layers;
  window->others_BTLK = Filled<int64_t>({B, T, L, K - 1}, window->num_experts);
  int64_t* others = window->others_BTLK.data_ptr<int64_t>();
  for (int64_t b = 0; b < B; ++b) {
    const RoutingSpan& span = SpanOf(*traces[static_cast<size_t>(b)], window->stack);
    for (int64_t l = 0; l < known; ++l) {
      for (int64_t t = 0; t < span.num_tokens; ++t) {
        const auto at = static_cast<size_t>((l * span.num_tokens + t) * K + 1);
        std::copy_n(&span.topk_ids[at], K - 1, others + ((b * T + t) * L + l) * (K - 1));
      }
    }
  }
}

void CheckOneModel(const Traces& traces, Stack stack, int source_layer) {
  if (traces.empty()) throw std::logic_error("a batch of no windows");
  const RoutingSpan& first = SpanOf(*traces[0], stack);
  for (const RoutingTrace* trace : traces) {
    const RoutingSpan& span = SpanOf(*trace, stack);
    CheckSource(span, stack, source_layer);
    const bool same_width =
        span.hidden_width == first.hidden_width || !HasStates(span) || !HasStates(first);
    if (span.num_layers != first.num_layers || !same_width) {
      throw std::logic_error("windows of different models in one batch");
    }
  }
}

}  // namespace

RoutingWindow WindowsOf(const Traces& traces, Stack stack, int source_layer,
                        int num_experts, int experts_per_token, bool router_inputs) {
  CheckOneModel(traces, stack, source_layer);
  const auto B = static_cast<int64_t>(traces.size());
  const int64_t T = LongestOf(traces, stack);
  RoutingWindow window;
  window.stack = stack;
  window.source_layer = source_layer;
  window.num_layers = SpanOf(*traces[0], stack).num_layers;
  window.num_experts = num_experts;
  window.token_ids_BT = Filled<int64_t>({B, T}, 0);
  window.valid_BT = Filled<bool>({B, T}, false);
  const int64_t L = window.num_layers;
  window.experts_BTL = Filled<int64_t>({B, T, L}, num_experts);
  const int known = stack == Stack::kEncoder ? source_layer + 1 : window.num_layers;
  for (int64_t b = 0; b < B; ++b) {
    const RoutingSpan& span = SpanOf(*traces[static_cast<size_t>(b)], stack);
    const int64_t tokens = span.num_tokens;
    std::copy(span.token_ids.begin(), span.token_ids.end(),
              window.token_ids_BT.data_ptr<int64_t>() + b * T);
    std::fill_n(window.valid_BT.data_ptr<bool>() + b * T, tokens, true);
    int64_t* experts = window.experts_BTL.data_ptr<int64_t>() + b * T * L;
    for (int64_t l = 0; l < known && !span.expert_ids.empty(); ++l) {
      for (int64_t t = 0; t < tokens; ++t) {
        experts[t * L + l] = span.expert_ids[static_cast<size_t>(l * tokens + t)];
      }
    }
  }
  if (experts_per_token > 1) AddOthers(traces, known, experts_per_token, &window);
  if (router_inputs) {
    AddStates(traces, &window);
    AddAttention(traces, &window);
  }
  return window;
}

void AddGates(const Traces& traces, RoutingWindow* window) {
  const int source = window->source_layer;
  const bool all = source >= 0 && All(traces, [&](const RoutingTrace& trace) {
                     const RoutingSpan& span = SpanOf(trace, window->stack);
                     return !span.topk_ids.empty() && !span.topk_probs.empty();
                   });
  if (!all) return;
  const auto B = static_cast<int64_t>(traces.size());
  const int64_t T = window->token_ids_BT.size(1), E = window->num_experts;
  window->gates_BTE = Filled<float>({B, T, E}, 0);
  for (int64_t b = 0; b < B; ++b) {
    const RoutingSpan& span = SpanOf(*traces[static_cast<size_t>(b)], window->stack);
    float* to = window->gates_BTE.data_ptr<float>() + b * T * E;
    for (int64_t t = 0; t < span.num_tokens; ++t) {
      const int64_t row = (int64_t{source} * span.num_tokens + t) * span.top_k;
      for (int64_t k = 0; k < span.top_k; ++k) {
        const auto at = static_cast<size_t>(row + k);
        to[t * E + span.topk_ids[at]] = span.topk_probs[at];
      }
    }
  }
}

RoutingWindow WindowOf(const RoutingTrace& trace, Stack stack, int source_layer,
                       int num_experts, int experts_per_token) {
  return WindowsOf({&trace}, stack, source_layer, num_experts, experts_per_token);
}

RoutingWindow WithoutTokens(const RoutingWindow& window, int64_t count) {
  if (count == 0) return window;
  RoutingWindow rest = window;
  const int64_t left = window.token_ids_BT.size(1) - count;
  for (at::Tensor* rows :
       {&rest.token_ids_BT, &rest.valid_BT, &rest.experts_BTL, &rest.others_BTLK,
        &rest.hidden_BTD, &rest.context_BTD, &rest.gates_BTE, &rest.attention_entropy_BTA,
        &rest.attended_ids_BTAK}) {
    if (rows->defined()) *rows = rows->narrow(1, count, left);
  }
  rest.first_token += count;
  rest.before_BL = window.experts_BTL.select(1, count - 1);
  if (window.others_BTLK.defined()) {
    rest.before_others_BLK = window.others_BTLK.select(1, count - 1);
  }
  return rest;
}

at::Tensor OutputOf(const RoutingTrace& trace) {
  const RoutingSpan& span = trace.decoder;
  if (span.output.empty()) return {};
  at::Tensor output = at::empty({1, span.num_tokens, span.hidden_width}, at::kFloat);
  PutStates(span.output.data(), span.num_tokens, span.num_tokens, span.hidden_width,
            output.data_ptr<float>());
  return output;
}

}  // namespace routecast
