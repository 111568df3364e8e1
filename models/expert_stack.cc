#include "models/expert_stack.h"

#include <ATen/ATen.h>

#include <array>
#include <stdexcept>

#include "models/device_choice.h"

namespace routecast {
namespace {

constexpr int64_t kAlignment = 16;  // bytes that the grouped product wants of a row

std::optional<at::Tensor> OneTensor(std::span<const ExpertWeights> layer,
                                  at::Tensor ExpertWeights::*part) {
  const at::Tensor& first = layer.front().*part;
  if (!first.defined() || first.dim() != 2 || !first.is_contiguous()) return std::nullopt;
  const auto bytes = static_cast<int64_t>(first.nbytes());
  const auto row = first.size(1) * static_cast<int64_t>(first.element_size());
  const auto* base = static_cast<const char*>(first.const_data_ptr());
  if (row % kAlignment != 0 || reinterpret_cast<uintptr_t>(base) % kAlignment != 0)
    return std::nullopt;
  for (size_t e = 0; e < layer.size(); ++e) {
    const at::Tensor& tensor = layer[e].*part;
    if (!tensor.defined() || !tensor.is_alias_of(first) || !tensor.is_contiguous() ||
        tensor.sizes() != first.sizes() || tensor.scalar_type() != first.scalar_type() ||
        static_cast<const char*>(tensor.const_data_ptr()) !=
            base + static_cast<int64_t>(e) * bytes) {
      return std::nullopt;
    }
  }
  return first.as_strided(
      {static_cast<int64_t>(layer.size()), first.size(0), first.size(1)},
      {first.numel(), first.size(1), 1}, first.storage_offset());
}

// The name without the expert's number, and the number.
std::pair<std::string, int64_t> StackAndPlace(const std::string& name) {
  constexpr char kMark[] = ".experts.expert_";
  const size_t at = name.find(kMark);
  if (at == std::string::npos) throw std::logic_error("no expert's tensor: " + name);
  const size_t number = at + sizeof kMark - 1, end = name.find('.', number);
  std::string stack = name;
  stack.erase(number, end - number);
  return {stack, std::stoll(name.substr(number, end - number))};
}

}  // namespace

bool HasGroupedProducts(at::Device device, at::ScalarType dtype) {
  if (!device.is_cuda() || dtype != at::kBFloat16) return false;
  const int major = CudaComputeMajor(device.has_index() ? device.index() : 0);
  return major == 9 || major == 10;
}

std::optional<ExpertStack> StackOf(std::span<const ExpertWeights> layer) {
  if (layer.empty()) return std::nullopt;
  const auto wi = OneTensor(layer, &ExpertWeights::wi_FD);
  const auto wo = OneTensor(layer, &ExpertWeights::wo_DF);
  if (!wi || !wo) return std::nullopt;
  ExpertStack stack{*wi, *wo};
  if (!layer.front().gate_FD.defined()) return stack;
  const auto gate = OneTensor(layer, &ExpertWeights::gate_FD);
  if (!gate) return std::nullopt;
  stack.gate_EFD = *gate;
  return stack;
}

at::Tensor GroupedFeedForward(Activation activation, const ExpertStack& stack,
                              const at::Tensor& rows_ND, const at::Tensor& offsets_E1) {
  const at::Tensor ends_E = offsets_E1.narrow(0, 1, offsets_E1.size(0) - 1).to(at::kInt);
  const auto product = [&](const at::Tensor& x, const at::Tensor& weights) {
    return at::_grouped_mm(x, weights.transpose(1, 2), ends_E);
  };
  at::Tensor inner = Activate(activation, product(rows_ND, stack.wi_EFD));
  if (stack.gate_EFD.defined()) inner = inner * product(rows_ND, stack.gate_EFD);
  return product(inner, stack.wo_EDF);
}

at::Tensor ExpertStacker::Place(const std::string& name, const at::Tensor& weight,
                                at::Device device) {
  const auto [key, expert] = StackAndPlace(name);
  at::Tensor& stack = stacks_[key];
  if (!stack.defined()) {
    stack = at::empty({num_experts_, weight.size(0), weight.size(1)},
                      weight.options().device(device));
  }
  at::Tensor view = stack[expert];
  view.copy_(weight);
  return view;
}

}  // namespace routecast
