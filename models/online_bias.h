// Adapts a predictor to what it serves: one bias a (stack, source layer, lead) and
// expert, which follows the gradient of the cross-entropy of what then happened. Only
// experts' frequencies can be learnt this way; it costs E additions a question. N rows, E
// experts, K experts a token. Thread rule: one thread at a time.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <tuple>

#include "common/routing.h"

namespace routecast {

class OnlineBias {
 public:
  // rate: of one token's gradient, 0 < rate < 1. Starts at zero: without effect.
  explicit OnlineBias(double rate) : rate_(rate) {}
  // softmax(log(probs) + bias), [.., E].
  at::Tensor Apply(Stack stack, int source_layer, int lead,
                   const at::Tensor& probs) const;
  // adapted_NE: what Apply gave; labels_NK: what was chosen, -100 = rows that do not
  // count.
  void Learn(Stack stack, int source_layer, int lead, const at::Tensor& adapted_NE,
             const at::Tensor& labels_NK);

 private:
  double rate_;
  std::map<std::tuple<Stack, int, int>, at::Tensor> bias_;  // [E]
};

}  // namespace routecast
