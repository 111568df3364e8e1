#include "models/attention.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>

#include <algorithm>

#include "models/attention_loops.h"

namespace routecast {
namespace {

constexpr int64_t kGrain = 1 << 18;  // products that are worth a thread

bool OwnLoopsServe(const at::Tensor& x) {
  return x.device().is_cpu() && x.scalar_type() == at::kFloat && x.numel() > 0 &&
         !(c10::GradMode::is_enabled() && x.requires_grad());
}

at::Tensor Dense(const at::Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }
AttentionCall::Strides StridesOf(const at::Tensor& x) {
  return {x.stride(0), x.stride(1), x.stride(2)};
}

}  // namespace

bool OwnAttentionServes(const at::Tensor& x, int64_t queries, int64_t depth) {
  return AttentionLoopFor(queries, depth) != nullptr && OwnLoopsServe(x);
}

at::Tensor MultiHeadAttention(const at::Tensor& q_BHTK, const at::Tensor& k_BHSK,
                              const at::Tensor& v_BHSK, const at::Tensor& bias,
                              bool causal, at::Tensor* weights_BHTS,
                              const at::Tensor& mask_B11S) {
  const int64_t batch = q_BHTK.size(0), heads = q_BHTK.size(1), queries = q_BHTK.size(2),
                depth = q_BHTK.size(3), keys = k_BHSK.size(2);
  AttentionLoop* const loop = AttentionLoopFor(queries, depth);
  if (loop == nullptr || !OwnLoopsServe(q_BHTK) || !OwnLoopsServe(k_BHSK) ||
      !OwnLoopsServe(v_BHSK) || !OwnLoopsServe(bias)) {
    const at::Tensor added = mask_B11S.defined() ? bias + mask_B11S : bias;
    const at::Tensor weights =
        at::softmax(at::matmul(q_BHTK, k_BHSK.transpose(2, 3)).add_(added), -1);
    if (weights_BHTS != nullptr) *weights_BHTS = weights;
    return at::matmul(weights, v_BHSK)
        .transpose(1, 2)
        .reshape({batch, queries, heads * depth});
  }
  const at::Tensor q = Dense(q_BHTK), k = Dense(k_BHSK), v = Dense(v_BHSK),
                   b = Dense(bias.expand({batch, heads, queries, keys}));
  const at::Tensor mask =
      mask_B11S.defined() ? Dense(mask_B11S.expand({batch, 1, 1, keys})) : mask_B11S;
  const at::Tensor out = at::empty({batch, queries, heads * depth}, q.options());
  if (weights_BHTS != nullptr) {
    *weights_BHTS = at::zeros({batch, heads, queries, keys}, q.options());
  }
  const AttentionCall call{
      q.const_data_ptr<float>(),
      k.const_data_ptr<float>(),
      v.const_data_ptr<float>(),
      b.const_data_ptr<float>(),
      mask.defined() ? mask.const_data_ptr<float>() : nullptr,
      out.mutable_data_ptr<float>(),
      weights_BHTS != nullptr ? weights_BHTS->mutable_data_ptr<float>() : nullptr,
      StridesOf(q),
      StridesOf(k),
      StridesOf(v),
      StridesOf(b),
      mask.defined() ? mask.stride(0) : 0,
      heads,
      queries,
      keys,
      depth,
      causal};
  at::parallel_for(0, batch * heads,
                   std::max<int64_t>(1, kGrain / (2 * queries * keys * depth)),
                   [&](int64_t begin, int64_t end) { loop(call, begin, end); });
  return out;
}

}  // namespace routecast
