#include "models/online_bias.h"

#include <ATen/ATen.h>

namespace routecast {
namespace {

constexpr double kSmallest = 1e-9;  // keeps the logarithm finite

}  // namespace

at::Tensor OnlineBias::Apply(Stack stack, int source_layer, int lead,
                             const at::Tensor& probs) const {
  const auto it = bias_.find({stack, source_layer, lead});
  if (it == bias_.end()) return probs;
  return at::softmax(probs.clamp_min(kSmallest).log() + it->second, -1);
}

void OnlineBias::Learn(Stack stack, int source_layer, int lead,
                       const at::Tensor& adapted_NE, const at::Tensor& labels_NK) {
  const at::Tensor rows = labels_NK.select(1, 0).ge(0).nonzero().squeeze(1);
  if (rows.size(0) == 0) return;
  const at::Tensor labels = labels_NK.index_select(0, rows);
  const int64_t experts = adapted_NE.size(1);
  const double share = 1.0 / static_cast<double>(labels.size(1));
  const at::Tensor chosen = at::one_hot(labels, experts).sum(1).to(at::kFloat) * share;
  const at::Tensor surplus = (chosen - adapted_NE.index_select(0, rows)).sum(0) * rate_;
  at::Tensor& bias = bias_[{stack, source_layer, lead}];
  bias = bias.defined() ? bias + surplus : surplus;
}

}  // namespace routecast
