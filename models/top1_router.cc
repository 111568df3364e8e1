#include "models/top1_router.h"

#include <ATen/ATen.h>

namespace routecast {

Top1Choice ChooseTop1(const at::Tensor& input_BTD, const at::Tensor& weight_ED,
                      const at::Tensor& bias_E, at::ScalarType model_dtype) {
  const at::Tensor logits = bias_E.defined() ? at::linear(input_BTD, weight_ED, bias_E)
                                             : at::linear(input_BTD, weight_ED);
  const at::Tensor probs = at::softmax(logits, -1).to(model_dtype);
  Top1Choice choice;
  choice.logits_BTE = logits.to(at::kFloat);
  choice.expert_ids_BT = probs.argmax(-1);
  choice.gate_probs_BT = probs.gather(-1, choice.expert_ids_BT.unsqueeze(-1)).squeeze(-1);
  return choice;
}

at::Tensor DroppedByCapacity(const at::Tensor& expert_ids_BT, int64_t num_experts,
                             int64_t capacity, const at::Tensor& counted_BT) {
  const bool all = !counted_BT.defined();
  if (all && expert_ids_BT.size(1) <= capacity) {
    return at::zeros_like(expert_ids_BT, at::kBool);  // cannot overflow
  }
  at::Tensor one_hot = at::one_hot(expert_ids_BT, num_experts);
  if (!all) one_hot = one_hot * counted_BT.unsqueeze(-1);
  const at::Tensor position = (one_hot.cumsum(1) * one_hot).sum(-1);  // from 1
  const at::Tensor over = position > capacity;
  return all ? over : over.logical_or(counted_BT.logical_not());
}

}  // namespace routecast
