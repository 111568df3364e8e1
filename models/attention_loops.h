// The loops of MultiHeadAttention on a CPU (attention.h).
#pragma once

#include <cstdint>

namespace routecast {

// All of one call, float32. Strides are in numbers: of sequences (b), heads (h) and rows
// (t); the last dimension is dense.
struct AttentionCall {
  struct Strides {
    int64_t b, h, t;
  };
  const float *q, *k, *v, *bias;
  const float* mask;  // [B,S], added to the bias, or null
  float* out;         // [B,T,H*K]
  float* weights;     // [B,H,T,S], zeros at first, or null
  Strides q_at, k_at, v_at, bias_at;
  int64_t mask_at;  // of sequences
  int64_t heads, queries, keys, depth;
  bool causal;
};

// Heads [begin, end), counted over all sequences. Any thread, of any heads side by side.
using AttentionLoop = void(const AttentionCall& call, int64_t begin, int64_t end);

// What this machine has for calls of these sizes; null: nothing.
AttentionLoop* AttentionLoopFor(int64_t queries, int64_t depth);

}  // namespace routecast
