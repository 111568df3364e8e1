// T5's attention of many queries over a sequence's keys: softmax(q k^T + bias) v, without
// scaling. Any thread.
#pragma once

#include <ATen/core/Tensor.h>

namespace routecast {

// q [B,H,T,K], k and v [B,H,S,K], of any strides; bias is broadcast to [B,H,T,S]. `mask`,
// [B,1,1,S], where it is defined, is added to the bias: for own loops it needs no sum of
// both in memory, which is as large as all scores.
// `causal`: queries are the last T of the keys' positions, and the bias masks what lies
// behind each, which is then not computed. Returns [B,T,H*K], contiguous: what the output
// projection takes. `weights`, where it is not null, becomes the softmax, [B,H,T,S]; the
// result is the same with it and without.
//
// Float32 on a CPU with AVX2, without gradients, from 4 queries up: own loops, a head of
// a sequence after the other, so that scores never leave the cache; all else by the
// library's products, whose sums may differ in their last bits. In own loops a row does
// not depend on the other rows, nor on how many masked keys follow.
at::Tensor MultiHeadAttention(const at::Tensor& q_BHTK, const at::Tensor& k_BHSK,
                              const at::Tensor& v_BHSK, const at::Tensor& bias,
                              bool causal, at::Tensor* weights_BHTS,
                              const at::Tensor& mask_B11S = {});

// Whether own loops serve a pass of `queries` over states like `x`, with heads of
// `depth`.
bool OwnAttentionServes(const at::Tensor& x, int64_t queries, int64_t depth);

}  // namespace routecast
