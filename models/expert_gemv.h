// Experts of a few tokens without the host knowing which: the device looks up each
// token's expert in a table of addresses. Reads an expert's weights once a token, so it
// serves decoding, not long passes. On a GPU everything is queued on the current stream,
// and may be recorded in a graph.
// Shape letters: N tokens, D model width, F expert width, E experts of a layer.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <span>

#include "models/activation.h"
#include "models/expert_source.h"

namespace routecast {

// Where a layer's experts lie. Does not keep them: whoever fills it does. Rows may be
// rewritten (on the stream of the calls) as experts come and go.
struct ExpertTable {
  at::Tensor addresses_E3;  // int64, on the experts' device: wi_FD, wo_DF, gate_FD; 0 =
                            // no weights there
  at::ScalarType dtype = at::kFloat;
  int64_t d_model = 0, d_ff = 0;
  bool gated = false;
};

// Of one layer's experts: all there and as AddressesOf wants them.
ExpertTable TableOf(std::span<const ExpertWeights> layer);
// The row of an expert. Throws std::logic_error where the weights are not contiguous, not
// of the table's shape, dtype and device, or, with rows of whole 16-byte words, begin
// between two (allocators and slots give none such).
std::array<int64_t, 3> AddressesOf(const ExpertWeights& expert, const ExpertTable& table);

// [N,D]: wo act(wi x), or wo (act(wi x) * (gate x)), for each token with its own expert's
// weights; sums in fp32, every step rounded to the table's dtype, as LocalExpertExecutor.
// A token whose expert is not in the table gets NaN; one of id -1 gets nothing: its row
// is not written. REQUIRES x [N,D] of the table's dtype and device, ids int64 in -1..E-1
// on it. No gradients.
at::Tensor ExpertGemv(Activation activation, const ExpertTable& table,
                      const at::Tensor& x_ND, const at::Tensor& expert_ids_N);
// The same into `out_ND`, contiguous, like x.
void ExpertGemvInto(Activation activation, const ExpertTable& table,
                    const at::Tensor& x_ND, const at::Tensor& expert_ids_N,
                    const at::Tensor& out_ND);

}  // namespace routecast
