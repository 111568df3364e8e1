// Where models of expert ids start from: log-probabilities counted in the train part,
// from the experts at the source layer, with a learnt gain by source layer.
// M members (speculation_layers.h), B sequences, T tokens, H leads, E experts.
#pragma once

#include "models/baseline_predictors.h"
#include "models/routing_window.h"
#include "models/speculation_layers.h"

namespace routecast {

class MarkovPrior {
 public:
  // Adds the table to `constants` and the gain to make's parameters. Zeros until Fit.
  MarkovPrior(ParameterMaker* make, Parameters* constants, const MoeGeometry& geometry);
  void Fit(const BaselineTables& tables);
  // logits [M * B,T,H,E] + what was counted; before the first layer nothing was.
  at::Tensor AddTo(const at::Tensor& logits_BTHE, const RoutingWindow& window) const;

 private:
  at::Tensor Logits(const RoutingWindow& window, int64_t leads) const;
  MoeGeometry geometry_;
  at::Tensor table_;  // constant, [layers * (E + 1),leads * E]; zeros if unknown
  at::Tensor gain_;   // [layers]
};

}  // namespace routecast
