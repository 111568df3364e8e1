// Small seeded traces and windows for the tests of speculation.
#pragma once

#include <ATen/ATen.h>

#include "common/random.h"
#include "models/speculation_model.h"

namespace routecast {

inline MoeGeometry SmallGeometry() {
  MoeGeometry g;
  g.encoder_layers = 4;
  g.decoder_layers = 3;
  g.num_experts = 5;
  g.d_model = 6;
  return g;
}

inline RoutingSpan RandomSpan(const MoeGeometry& g, Stack stack, int tokens,
                              uint64_t seed) {
  RoutingSpan span;
  span.num_tokens = tokens;
  span.num_layers = g.layers(stack);
  span.hidden_width = g.d_model;
  for (int t = 0; t < tokens; ++t) {
    span.token_ids.push_back(static_cast<uint32_t>(ToRange(Mix(seed, 1, t), 11)));
  }
  for (int i = 0; i < tokens * span.num_layers; ++i) {
    span.expert_ids.push_back(
        static_cast<uint16_t>(ToRange(Mix(seed, 2, i), g.num_experts)));
    span.dropped.push_back(ToRange(Mix(seed, 3, i), 7) == 0);
    for (int d = 0; d < g.d_model; ++d) {
      span.hidden.push_back(
          FloatToBf16(static_cast<float>(ToNormal(Mix(seed, 4, i, d)))));
    }
  }
  return span;
}

inline RoutingTrace RandomTrace(const MoeGeometry& g, int source_tokens,
                                int target_tokens, uint64_t seed) {
  RoutingTrace trace;
  trace.sequence_id = trace.document_id = trace.group_id = seed;
  trace.encoder = RandomSpan(g, Stack::kEncoder, source_tokens, Mix(seed, 10));
  trace.decoder = RandomSpan(g, Stack::kDecoder, target_tokens, Mix(seed, 20));
  return trace;
}

inline RoutingWindow BatchOf(const std::vector<RoutingTrace>& traces, Stack stack,
                             int source, int num_experts, int experts_per_token = 1) {
  std::vector<const RoutingTrace*> all;
  for (const RoutingTrace& trace : traces) all.push_back(&trace);
  return WindowsOf(all, stack, source, num_experts, experts_per_token);
}

// Every kind, and "hidden_mixed": with attention among the encoder's tokens.
inline std::vector<std::string> SpeculationNames() {
  auto names = SpeculationKinds();
  names.push_back("hidden_mixed");
  return names;
}

inline SpeculationConfig SmallSpeculation(const std::string& name) {
  const bool mixed = name == "hidden_mixed";
  SpeculationConfig c =
      DefaultSpeculationConfig(mixed ? "hidden" : name, SmallGeometry(), 11, 6);
  c.encoder_attention = mixed;
  const auto shrink = [](SpeculationConfig* config) {
    config->width = 16;
    config->heads = 2;
    config->ff = 24;
    config->dropout = 0.1;
  };
  shrink(&c);
  c.positions = c.kind == "hidden";
  for (SpeculationConfig& member : c.members) shrink(&member);
  if (!c.members.empty()) c.members[1] = c.members[0];  // the third has another depth
  return c;
}

}  // namespace routecast
