// AdamW (Loshchilov, Hutter 2019) with LibTorch's fused kernels; decoupled weight decay.
// Thread rule: the training thread.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "models/parameters.h"

namespace routecast {

struct AdamWOptions {
  double beta1 = 0.9, beta2 = 0.99, epsilon = 1e-8, weight_decay = 0.01;
};

class AdamW {
 public:
  // Weight decay acts on matrices only: not on norms, biases and position tables of one
  // dimension. Shares the parameters; gradients are read from .grad().
  AdamW(const Parameters& parameters, AdamWOptions options);
  void Step(double learning_rate);
  // Moments and step counts as named tensors, for checkpoints; Load REQUIRES the same
  // names.
  Parameters State() const;
  void Load(const Parameters& state);

 private:
  struct Group {
    double weight_decay = 0;
    std::vector<std::string> names;
    std::vector<at::Tensor> parameters, first, second, steps;
  };
  AdamWOptions options_;
  Group groups_[2];
};

}  // namespace routecast
