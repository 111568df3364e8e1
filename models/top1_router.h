// The routing of one MoE layer, as pure functions: choice, probability, capacity.
// Reference: transformers 5.23.0, SwitchTransformersTop1Router. Any thread. On a GPU
// everything is queued on the current stream; the host does not wait.
// Shape letters: B sequences, T tokens, D model width, E experts.
#pragma once

#include <ATen/core/Tensor.h>

namespace routecast {

struct Top1Choice {
  at::Tensor logits_BTE;     // raw, fp32 whatever the router computes in
  at::Tensor expert_ids_BT;  // int64; of equal probabilities the lowest index
  at::Tensor gate_probs_BT;  // probability of the choice, in the model's dtype
  at::Tensor margins_BT;     // largest logit minus the second, fp32; 0 for one expert
};

// weight_ED and bias_E (undefined = none) and the input are in the router's dtype, in
// which logits and softmax are computed. The argmax is taken on the probabilities rounded
// to `model_dtype`: narrow types tie where the logits do not. Gradients flow.
Top1Choice ChooseTop1(const at::Tensor& input_BTD, const at::Tensor& weight_ED,
                      const at::Tensor& bias_E, at::ScalarType model_dtype);
// The same, from the router's logits in its dtype.
Top1Choice Top1OfLogits(const at::Tensor& logits_BTE, at::ScalarType model_dtype);

// True where an expert's `capacity` was spent by earlier tokens of the same sequence.
// Where counted_BT (bool) is defined, the tokens that it leaves out spend nothing and are
// dropped themselves. REQUIRES ids in 0..num_experts-1.
at::Tensor DroppedByCapacity(const at::Tensor& expert_ids_BT, int64_t num_experts,
                             int64_t capacity, const at::Tensor& counted_BT);

}  // namespace routecast
