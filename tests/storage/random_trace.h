// Traces with every plane, as a pure function of their id; floats are bf16 values, so
// that a store gives them back unchanged.
#pragma once

#include <map>
#include <numeric>
#include <string>

#include "common/random.h"
#include "common/routing.h"
#include "storage/store_config.h"
#include "storage/trace_store.h"

namespace routecast {

struct TraceShape {
  int num_experts = 128, layers = 3, top_k = 2, width = 8;
  int min_tokens = 1, max_tokens = 40;
  double hidden_share = 0.5;
  int heads = 0;  // of the attention, where router inputs are
  // The top-k begins with the choice (mostly: probabilities may tie), and has no expert
  // twice.
  bool distinct = false;
};

// Behind a token's first expert others in turn, from a few strides.
inline void DrawDistinct(uint64_t key, int num_experts, RoutingSpan* s) {
  const auto experts = static_cast<uint64_t>(num_experts);
  for (size_t i = 0; i < s->expert_ids.size(); ++i) {
    uint64_t at = s->expert_ids[i];
    if (Mix(key, 10, i) % 50 == 0) at = (at + 1) % experts;
    uint64_t stride = 1 + Mix(key, 11, i) % 3;
    while (std::gcd(stride, experts) != 1) ++stride;
    for (int r = 0; r < s->top_k; ++r, at = (at + stride) % experts) {
      s->topk_ids[i * static_cast<size_t>(s->top_k) + static_cast<size_t>(r)] =
          static_cast<uint16_t>(at);
    }
  }
}

inline RoutingSpan RandomSpan(uint64_t key, const TraceShape& shape, bool hidden) {
  RoutingSpan s;
  s.num_tokens =
      shape.min_tokens +
      static_cast<int>(ToRange(Mix(key, 1), shape.max_tokens - shape.min_tokens + 1));
  s.num_layers = shape.layers;
  s.top_k = shape.top_k;
  const uint64_t n = static_cast<uint64_t>(s.num_tokens) * s.num_layers;
  const auto real = [&](uint64_t what, uint64_t i) {
    return Bf16ToFloat(FloatToBf16(static_cast<float>(ToUnit(Mix(key, what, i)))));
  };
  const auto expert = [&](uint64_t what, uint64_t i) {
    return static_cast<uint16_t>(ToRange(Mix(key, what, i), shape.num_experts));
  };
  for (int t = 0; t < s.num_tokens; ++t)
    s.token_ids.push_back(ToRange(Mix(key, 2, t), 32128));
  for (uint64_t i = 0; i < n; ++i) {
    s.expert_ids.push_back(expert(3, i));
    s.gate_probs.push_back(real(4, i));
    s.dropped.push_back(Mix(key, 5, i) % 10 == 0);
    s.margins.push_back(real(6, i));
  }
  for (uint64_t i = 0; i < n * s.top_k; ++i) {
    s.topk_ids.push_back(expert(7, i));
    s.topk_probs.push_back(real(8, i));
  }
  if (shape.distinct) DrawDistinct(key, shape.num_experts, &s);
  if (hidden) {
    s.hidden_width = shape.width;
    for (uint64_t i = 0; i < n * s.hidden_width; ++i) {
      s.hidden.push_back(static_cast<uint16_t>(Mix(key, 9, i)));
    }
  }
  return s;
}

inline void AddAttention(RoutingSpan* span, Stack stack, uint64_t key, int heads) {
  span->attention_heads = heads * (stack == Stack::kDecoder ? 2 : 1);
  const auto tokens = static_cast<uint64_t>(span->num_tokens);
  const uint64_t rows = tokens * static_cast<uint64_t>(span->num_layers) *
                        static_cast<uint64_t>(span->attention_heads);
  for (uint64_t i = 0; i < rows; ++i) {
    const auto entropy = static_cast<float>(3 * ToUnit(Mix(key, i)));
    span->attention_entropy.push_back(Bf16ToFloat(FloatToBf16(entropy)));
    for (uint64_t k = 0; k < kStrongestKeys; ++k) {
      span->attention_keys.push_back(
          k < tokens ? static_cast<uint16_t>(ToRange(Mix(key, i, k), tokens)) : kNoKey);
    }
  }
}

inline RoutingTrace RandomTrace(uint64_t id, const TraceShape& shape = {}) {
  RoutingTrace trace;
  trace.sequence_id = id;
  trace.document_id = id / 3;
  trace.group_id = Mix(id / 3, 17);
  const bool hidden = HiddenShareOf(trace.group_id, shape.hidden_share);
  trace.encoder = RandomSpan(Mix(id, 100), shape, hidden);
  trace.decoder = RandomSpan(Mix(id, 200), shape, hidden);
  for (int i = 0; hidden && i < trace.decoder.num_tokens * shape.width; ++i) {
    trace.decoder.output.push_back(static_cast<uint16_t>(Mix(id, 300, i)));
  }
  if (hidden && shape.heads > 0) {
    AddAttention(&trace.encoder, Stack::kEncoder, Mix(id, 400), shape.heads);
    AddAttention(&trace.decoder, Stack::kDecoder, Mix(id, 500), shape.heads);
  }
  return trace;
}

inline StoreConfig ConfigOf(const TraceShape& shape, int shards, int64_t chunks) {
  StoreConfig c;
  c.model = "model";
  c.model_fingerprint = "00000000000000aa";
  c.geometry = {shape.layers, shape.layers, shape.num_experts, 1, shape.width};
  c.record = {"ids", "probs", "topk", "hidden"};
  c.top_k = shape.top_k;
  c.num_shards = shards;
  c.num_chunks = chunks;
  c.hidden_share = shape.hidden_share;
  c.attention_heads = shape.heads;
  if (shape.heads > 0) c.record.push_back("attention");
  return c;
}

// Sequences of chunk c: ids are spread over chunks, as a permuted corpus spreads them.
inline std::map<uint64_t, RoutingTrace> ChunkTraces(uint32_t chunk, uint32_t chunks,
                                                    uint64_t per_chunk,
                                                    const TraceShape& shape = {}) {
  std::map<uint64_t, RoutingTrace> traces;
  for (uint64_t i = 0; i < per_chunk; ++i) {
    const uint64_t id = (i * chunks + chunk) * 65536 + i % 3;
    traces[id] = RandomTrace(id, shape);
  }
  return traces;
}

inline void StageChunk(const fs::path& store, const StoreConfig& config, uint32_t chunk,
                       uint64_t per_chunk, const TraceShape& shape,
                       const std::string& token, const StepObserver& on_step = {}) {
  ChunkWriter writer(store, config, chunk, token, on_step);
  const auto traces =
      ChunkTraces(chunk, static_cast<uint32_t>(config.num_chunks), per_chunk, shape);
  for (const auto& [id, trace] : traces) writer.Add(trace);
  writer.Finish();
}

}  // namespace routecast
