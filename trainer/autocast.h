// Forward passes whose products are in bfloat16, as LibTorch's autocast does it: matrix
// products and attention round their inputs and results, parameters stay what they are.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "models/speculation_model.h"

namespace routecast {

// While it lives, this thread's operations on `device` run under autocast to `dtype`;
// float32: nothing changes. Backward belongs outside: it follows what forward did.
// Thread rule: made and destroyed on one thread, innermost first.
class AutocastScope {
 public:
  AutocastScope(at::Device device, at::ScalarType dtype);
  ~AutocastScope();
  AutocastScope(const AutocastScope&) = delete;
  AutocastScope& operator=(const AutocastScope&) = delete;

 private:
  at::DeviceType device_;
  bool active_, enabled_before_ = false;
  at::ScalarType dtype_before_ = at::kFloat;
};

// model->ForwardMembers under autocast; outputs are float32, so that every loss is.
std::vector<SpeculationOutput> ForwardMembersAs(at::ScalarType dtype,
                                                SpeculationModel* model,
                                                const RoutingWindow& window,
                                                uint64_t dropout_key);

}  // namespace routecast
