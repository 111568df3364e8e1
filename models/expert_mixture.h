// A feed-forward layer of several experts, of which each row takes one (top-1 softmax
// router without bias). M members as in speculation_layers.h; D width, F inner width.
#pragma once

#include "models/speculation_layers.h"

namespace routecast {

class ExpertMixture {
 public:
  static constexpr int64_t kExperts = 8;
  ExpertMixture(ParameterMaker* make, const std::string& name, int64_t width, int64_t ff);

  struct Output {
    at::Tensor rows;     // as the input, times the router's probability
    at::Tensor balance;  // [M]: experts * sum of share * mean probability, 1 = balanced
  };
  // x [M * B,R,D]; counts [M * B,R], bool: the rows that the balance is taken over.
  Output operator()(const at::Tensor& x, const at::Tensor& counts,
                    KeyedDropout* dropout) const;

 private:
  at::Tensor router_;          // [8,D]
  at::Tensor in_, in_bias_;    // [8,F,D], [8,F]
  at::Tensor out_, out_bias_;  // [8,D,F], [8,D]
};

}  // namespace routecast
