// A layer's experts in one tensor a projection, so that all of its tokens take three
// products: the device reads where each expert's rows end, and the host does not wait.
// Shape letters: E experts of a layer, N tokens, D model width, F expert width.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <optional>
#include <span>
#include <string>

#include "models/activation.h"
#include "models/expert_source.h"

namespace routecast {

struct ExpertStack {
  at::Tensor wi_EFD, wo_EDF;
  at::Tensor gate_EFD{};  // undefined: not gated
};

// Whether the library's grouped product is one kernel here: bf16 on CUDA devices of
// compute capability 9 and 10. Elsewhere it is a loop that waits for the device.
bool HasGroupedProducts(at::Device device, at::ScalarType dtype);

// Views of the weights where all lie evenly in one storage a projection and rows are
// whole multiples of 16 bytes; else nullopt.
std::optional<ExpertStack> StackOf(std::span<const ExpertWeights> layer);

// [N,D]: wo act(wi x), or wo (act(wi x) * (gate x)), for rows sorted by expert: expert e
// has the rows offsets[e] to offsets[e+1]. Rows behind the last offset hold anything.
// REQUIRES rows_ND of the stack's dtype, offsets_E1 int64, both on its device.
at::Tensor GroupedFeedForward(Activation activation, const ExpertStack& stack,
                              const at::Tensor& rows_ND, const at::Tensor& offsets_E1);

// Where a loader puts experts that come one by one. Thread rule: one thread.
class ExpertStacker {
 public:
  explicit ExpertStacker(int num_experts) : num_experts_(num_experts) {}
  // Copies an expert's tensor into its place in the stack of its layer and projection,
  // whose memory is taken at the first of them; returns the view. REQUIRES
  // IsExpertTensor(name).
  at::Tensor Place(const std::string& name, const at::Tensor& weight, at::Device device);

 private:
  int num_experts_;
  std::map<std::string, at::Tensor> stacks_;  // by name without the expert's number
};

}  // namespace routecast
