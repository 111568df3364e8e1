#include "models/expert_execution.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <numeric>

#include "models/linear.h"

namespace routecast {

ResidentExpertSource::ResidentExpertSource(MoeGeometry geometry,
                                           std::vector<ExpertWeights> weights)
    : geometry_(geometry), weights_(std::move(weights)) {
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

at::Tensor ApplyFeedForward(Activation activation, const ExpertWeights& weights,
                            const at::Tensor& x_ND) {
  at::Tensor inner = Activate(activation, Linear(x_ND, weights.wi_FD));
  if (weights.gate_FD.defined()) inner = inner * Linear(x_ND, weights.gate_FD);
  return Linear(inner, weights.wo_DF);
}

at::Tensor LocalExpertExecutor::Run(int layer, const at::Tensor& tokens_ND,
                                    const at::Tensor& expert_ids_N) {
  const int64_t n = tokens_ND.size(0);
  const at::Tensor ids = expert_ids_N.contiguous();
  const int64_t* expert_of = ids.data_ptr<int64_t>();
  // Stable grouping: tokens of one expert keep their order, so a group's product is the
  // same whatever the order in which experts become ready.
  at::Tensor order = at::empty({n}, at::kLong);
  int64_t* position = order.data_ptr<int64_t>();
  std::iota(position, position + n, 0);
  std::stable_sort(position, position + n,
                   [&](int64_t a, int64_t b) { return expert_of[a] < expert_of[b]; });
  std::vector<int> experts;
  std::vector<int64_t> begin;
  for (int64_t i = 0; i < n; ++i) {
    const int expert = static_cast<int>(expert_of[position[i]]);
    if (experts.empty() || experts.back() != expert) {
      experts.push_back(expert);
      begin.push_back(i);
    }
  }
  begin.push_back(n);

  const bool one_group = experts.size() == 1;
  const at::Tensor order_device = order.to(tokens_ND.device());
  const at::Tensor grouped_ND =
      one_group ? tokens_ND : tokens_ND.index_select(0, order_device);
  std::vector<at::Tensor> outputs(experts.size());
  source_->Begin(layer, experts);
  for (size_t i = 0; i < experts.size(); ++i) {
    const ExpertLease lease = source_->Next();
    const auto group = static_cast<size_t>(
        std::lower_bound(experts.begin(), experts.end(), lease.expert()) -
        experts.begin());
    const at::Tensor x =
        grouped_ND.narrow(0, begin[group], begin[group + 1] - begin[group]);
    outputs[group] = ApplyFeedForward(activation_, lease.weights(), x);
  }
  if (one_group) return outputs[0];
  at::Tensor inverse = at::empty({n}, at::kLong);
  int64_t* back = inverse.data_ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i) back[position[i]] = i;
  return at::cat(outputs, 0).index_select(0, inverse.to(tokens_ND.device()));
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
