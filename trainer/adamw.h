// AdamW (Loshchilov, Hutter 2019) with LibTorch's fused kernels; decoupled weight decay.
// Thread rule: the training thread.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "models/parameters.h"

namespace routecast {

struct AdamWOptions {
  double beta1 = 0.9, beta2 = 0.99, epsilon = 1e-8, weight_decay = 0.01;
};

// Parameters that are stepped alike, e.g. one member of an ensemble.
struct AdamWGroup {
  std::vector<ParameterSlice> parameters;
  double weight_decay = 0.01;
};

class AdamW {
 public:
  // Weight decay acts on matrices only: not on norms, biases and position tables of one
  // dimension. Shares the parameters; gradients are read from .grad().
  AdamW(const Parameters& parameters, AdamWOptions options);
  // Groups with a weight decay of their own (that of `options` is not read).
  AdamW(const std::vector<AdamWGroup>& groups, AdamWOptions options);
  void Step(double learning_rate);
  // One learning rate a group, in the constructor's order; below 0: nothing of the group
  // changes, not its moments either. `skip` (float32 [] on the parameters' device;
  // undefined = 0): where it is 1 nothing changes at all, found out on the device.
  // `beta1`: of this step, instead of the options'.
  void Step(const std::vector<double>& learning_rates, const at::Tensor& skip = {},
            std::optional<double> beta1 = {});
  // Moments and step counts as named tensors, for checkpoints; Load REQUIRES the same
  // names.
  Parameters State() const;
  void Load(const Parameters& state);

 private:
  struct Group {
    size_t rate = 0;  // which learning rate
    double weight_decay = 0;
    std::vector<ParameterSlice> slices;
    std::vector<at::Tensor> first, second, steps;
  };
  void Add(const std::vector<ParameterSlice>& slices, size_t rate, double weight_decay);
  AdamWOptions options_;
  std::vector<Group> groups_;
};

}  // namespace routecast
