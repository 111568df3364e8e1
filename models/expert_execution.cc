#include "models/expert_execution.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "models/linear.h"
#include "models/token_groups.h"

namespace routecast {

ResidentExpertSource::ResidentExpertSource(MoeGeometry geometry,
                                           std::vector<ExpertWeights> weights,
                                           Grouping grouping)
    : geometry_(geometry), weights_(std::move(weights)), grouping_(grouping) {
  if (static_cast<int>(weights_.size()) != geometry_.num_keys()) {
    throw std::logic_error("ResidentExpertSource: one entry an expert is needed");
  }
}

void ResidentExpertSource::Begin(int layer, std::span<const int> experts) {
  layer_ = layer;
  pending_.assign(experts.begin(), experts.end());
  next_ = 0;
}

ExpertLease ResidentExpertSource::Next() {
  const int expert = pending_.at(next_++);
  return {expert, weights_[ExpertKey{layer_, expert}.Index(geometry_)], nullptr};
}

const ExpertTable* ResidentExpertSource::Table(int layer) {
  const auto known = tables_.find(layer);
  if (known != tables_.end()) return known->second.get();
  const std::span<const ExpertWeights> experts(
      &weights_[ExpertKey{layer, 0}.Index(geometry_)],
      static_cast<size_t>(geometry_.num_experts));
  const bool all = std::all_of(experts.begin(), experts.end(), [](const auto& expert) {
    return expert.wi_FD.defined() && expert.wo_DF.defined();
  });
  auto& table = tables_[layer];
  if (all) table = std::make_unique<ExpertTable>(TableOf(experts));
  return table.get();
}

const ExpertStack* ResidentExpertSource::Stacked(int layer) {
  const auto known = stacks_.find(layer);
  if (known != stacks_.end()) return known->second ? &*known->second : nullptr;
  const std::span<const ExpertWeights> experts(
      &weights_[ExpertKey{layer, 0}.Index(geometry_)],
      static_cast<size_t>(geometry_.num_experts));
  const at::Tensor& first = experts.front().wi_FD;
  const bool fast =
      first.defined() && HasGroupedProducts(first.device(), first.scalar_type());
  auto& stack = stacks_[layer];
  if (grouping_ == Grouping::kAlways || fast) stack = StackOf(experts);
  return stack ? &*stack : nullptr;
}

at::Tensor ApplyFeedForward(Activation activation, const ExpertWeights& weights,
                            const at::Tensor& x_ND) {
  at::Tensor inner = activation == Activation::kRelu
                         ? LinearRelu(x_ND, weights.wi_FD)
                         : Activate(activation, Linear(x_ND, weights.wi_FD));
  if (weights.gate_FD.defined()) inner = inner * Linear(x_ND, weights.gate_FD);
  return Linear(inner, weights.wo_DF);
}

at::Tensor ExpertExecutor::RunSorted(int layer, const at::Tensor& rows_ND,
                                     std::span<const int64_t> offsets_E1) {
  at::Tensor ids = at::empty({offsets_E1.back()}, at::kLong);
  for (size_t e = 0; e + 1 < offsets_E1.size(); ++e) {
    ids.narrow(0, offsets_E1[e], offsets_E1[e + 1] - offsets_E1[e])
        .fill_(static_cast<int64_t>(e));
  }
  return Run(layer, rows_ND.narrow(0, 0, offsets_E1.back()), ids);
}

at::Tensor LocalExpertExecutor::Run(int layer, const at::Tensor& tokens_ND,
                                    const at::Tensor& expert_ids_N) {
  if (expert_ids_N.numel() == 0) return tokens_ND;
  const int64_t experts = expert_ids_N.max().item<int64_t>() + 1;
  TokenGroups groups = GroupByExpert(expert_ids_N, {}, experts);
  groups.order_N = groups.order_N.to(tokens_ND.device());
  const at::Tensor out = RunSorted(
      layer, GatherRows(tokens_ND, groups),
      {groups.offsets_E1.const_data_ptr<int64_t>(), static_cast<size_t>(experts) + 1});
  return out.index_select(0, groups.place_N.to(tokens_ND.device()));
}

// Tokens of one expert keep their order, so a group's product is the same whatever the
// order in which experts become ready.
at::Tensor LocalExpertExecutor::RunSorted(int layer, const at::Tensor& rows_ND,
                                          std::span<const int64_t> offsets_E1) {
  std::vector<int> experts;
  for (size_t e = 0; e + 1 < offsets_E1.size(); ++e) {
    if (offsets_E1[e + 1] > offsets_E1[e]) experts.push_back(static_cast<int>(e));
  }
  std::vector<at::Tensor> outputs(experts.size());
  source_->Begin(layer, experts);
  for (size_t i = 0; i < experts.size(); ++i) {
    const ExpertLease lease = source_->Next();
    const auto e = static_cast<size_t>(lease.expert());
    const auto group = static_cast<size_t>(
        std::lower_bound(experts.begin(), experts.end(), lease.expert()) -
        experts.begin());
    outputs[group] = ApplyFeedForward(
        activation_, lease.weights(),
        rows_ND.narrow(0, offsets_E1[e], offsets_E1[e + 1] - offsets_E1[e]));
  }
  return outputs.size() == 1 ? outputs[0] : at::cat(outputs, 0);
}

std::string ExpertTensorName(const SwitchConfig& config, ExpertKey key,
                             const std::string& tensor) {
  const MoeGeometry g = config.geometry();
  const Stack stack = g.StackOf(key.layer);
  int left = g.LayerInStack(key.layer), block = 0;
  for (;; ++block) {
    if (config.IsSparse(stack, block) && left-- == 0) break;
  }
  return std::string(StackName(stack)) + ".block." + std::to_string(block) + ".layer." +
         (stack == Stack::kEncoder ? "1" : "2") + ".mlp.experts.expert_" +
         std::to_string(key.expert) + "." + tensor + ".weight";
}

bool IsExpertTensor(const std::string& name) {
  return name.find(".mlp.experts.expert_") != std::string::npos;
}

std::vector<ExpertWeights> ExpertWeightsOf(const SwitchConfig& config,
                                           const Parameters& parameters) {
  const MoeGeometry g = config.geometry();
  std::vector<ExpertWeights> weights;
  for (int i = 0; i < g.num_keys(); ++i) {
    const ExpertKey key = ExpertKey::FromIndex(i, g);
    const auto get = [&](const char* tensor) {
      return parameters.Get(ExpertTensorName(config, key, tensor));
    };
    weights.push_back({get(config.is_gated_act ? "wi_0" : "wi"), get("wo"),
                       config.is_gated_act ? get("wi_1") : at::Tensor()});
  }
  return weights;
}

}  // namespace routecast
