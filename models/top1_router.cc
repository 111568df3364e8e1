#include "models/top1_router.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/GradMode.h>

#include <stdexcept>

#include "models/top1_body.h"

namespace routecast {
namespace {

int TypeIndex(at::ScalarType type) {
  if (type == at::kFloat) return 0;
  if (type == at::kBFloat16) return 1;
  if (type == at::kHalf) return 2;
  throw std::logic_error("top-1 routing: the type is none of fp32, bf16, fp16");
}

at::Tensor Margins(const at::Tensor& logits_BTE) {
  if (logits_BTE.size(-1) < 2) return at::zeros_like(logits_BTE).select(-1, 0);
  const at::Tensor top = std::get<0>(logits_BTE.detach().topk(2, -1));
  return top.select(-1, 0) - top.select(-1, 1);
}

// By the library, step by step: each has its gradient.
Top1Choice Differentiable(const at::Tensor& logits_BTE, at::ScalarType model_dtype) {
  const at::Tensor probs = at::softmax(logits_BTE, -1).to(model_dtype);
  Top1Choice choice;
  choice.logits_BTE = logits_BTE.to(at::kFloat);
  choice.expert_ids_BT = probs.argmax(-1);
  choice.gate_probs_BT = probs.gather(-1, choice.expert_ids_BT.unsqueeze(-1)).squeeze(-1);
  choice.margins_BT = Margins(choice.logits_BTE);
  return choice;
}

}  // namespace

Top1Choice ChooseTop1(const at::Tensor& input_BTD, const at::Tensor& weight_ED,
                      const at::Tensor& bias_E, at::ScalarType model_dtype) {
  return Top1OfLogits(bias_E.defined() ? at::linear(input_BTD, weight_ED, bias_E)
                                       : at::linear(input_BTD, weight_ED),
                      model_dtype);
}

Top1Choice Top1OfLogits(const at::Tensor& logits_BTE, at::ScalarType model_dtype) {
  if (c10::GradMode::is_enabled() && logits_BTE.requires_grad()) {
    return Differentiable(logits_BTE, model_dtype);
  }
  const c10::DeviceGuard guard(logits_BTE.device());
  const at::Tensor logits = logits_BTE.contiguous();
  const auto shape = logits.sizes().slice(0, static_cast<size_t>(logits.dim() - 1));
  Top1Choice choice;
  choice.logits_BTE = logits.to(at::kFloat);
  choice.expert_ids_BT = at::empty(shape, logits.options().dtype(at::kLong));
  choice.gate_probs_BT = at::empty(shape, logits.options().dtype(model_dtype));
  choice.margins_BT = at::empty(shape, logits.options().dtype(at::kFloat));
  const Top1Args args{logits.const_data_ptr(),
                      choice.expert_ids_BT.numel(),
                      logits.size(-1),
                      choice.expert_ids_BT.mutable_data_ptr<int64_t>(),
                      choice.gate_probs_BT.mutable_data_ptr(),
                      choice.margins_BT.mutable_data_ptr<float>()};
  (logits.is_cuda() ? Top1Cuda : Top1Cpu)(args, TypeIndex(logits.scalar_type()),
                                          TypeIndex(model_dtype));
  return choice;
}

at::Tensor DroppedByCapacity(const at::Tensor& expert_ids_BT, int64_t num_experts,
                             int64_t capacity, const at::Tensor& counted_BT) {
  if (!counted_BT.defined() && expert_ids_BT.size(1) <= capacity) {
    return at::zeros_like(expert_ids_BT, at::kBool);  // cannot overflow
  }
  const c10::DeviceGuard guard(expert_ids_BT.device());
  const at::Tensor ids = expert_ids_BT.contiguous();
  const at::Tensor counted = counted_BT.defined()
                                 ? counted_BT.to(ids.device(), at::kBool).contiguous()
                                 : at::Tensor();
  const at::Tensor counts =
      at::zeros({ids.size(0), num_experts}, ids.options().dtype(at::kInt));
  const at::Tensor dropped = at::empty(ids.sizes(), ids.options().dtype(at::kBool));
  const DropArgs args{ids.const_data_ptr<int64_t>(),
                      counted.defined() ? counted.const_data_ptr<bool>() : nullptr,
                      ids.size(0),
                      ids.size(1),
                      num_experts,
                      capacity,
                      counts.mutable_data_ptr<int>(),
                      dropped.mutable_data_ptr<bool>()};
  (ids.is_cuda() ? DropCuda : DropCpu)(args);
  return dropped;
}

}  // namespace routecast
