// Tokens sorted by the expert that they go to, and back. Pure functions: any thread. On a
// GPU everything is queued on the current stream; the host does not wait.
// Shape letters: N tokens, D model width, E experts.
#pragma once

#include <ATen/core/Tensor.h>

namespace routecast {

struct TokenGroups {
  at::Tensor order_N;     // int32: the token of each sorted row; those of one expert stay
                          // in their order, dropped tokens come last
  at::Tensor place_N;     // int32: the sorted row of each token; -1 where it is dropped
  at::Tensor offsets_E1;  // int64 [E+1]: expert e has rows offsets[e] to offsets[e+1]
};

// A counting sort. dropped_N (bool) undefined = none. REQUIRES ids in 0..num_experts-1,
// N below 2^31.
TokenGroups GroupByExpert(const at::Tensor& expert_ids_N, const at::Tensor& dropped_N,
                          int64_t num_experts);

// x's rows in sorted order, [N,D]. Gradients flow.
at::Tensor GatherRows(const at::Tensor& x_ND, const TokenGroups& groups);

// residual + gate * the token's row of `outputs` (sorted; [kept,D], or with rows behind
// that nobody reads); the residual alone where the token is dropped. Product and sum are
// each rounded to residual's dtype. gates_N of any floating type. Gradients flow.
at::Tensor AddScattered(const at::Tensor& residual_ND, const at::Tensor& outputs,
                        const at::Tensor& gates_N, const TokenGroups& groups);

}  // namespace routecast
