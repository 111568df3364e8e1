// Running a layer's experts where the model runs, and weights that are simply there.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "models/expert_gemv.h"
#include "models/expert_source.h"
#include "models/expert_stack.h"
#include "models/parameters.h"
#include "models/switch_config.h"

namespace routecast {

// Whether stacked experts run in grouped products: where that is one kernel, or always.
enum class Grouping { kWhereFast, kAlways };

// Every expert resident: leases cost nothing and come in ascending order.
class ResidentExpertSource final : public ExpertSource {
 public:
  // weights[ExpertKey::Index]; tensors are shared, not copied.
  ResidentExpertSource(MoeGeometry geometry, std::vector<ExpertWeights> weights,
                       Grouping grouping = Grouping::kWhereFast);
  void Begin(int layer, std::span<const int> experts) override;
  ExpertLease Next() override;
  int LeasesAtOnce() override { return geometry_.num_experts; }
  const ExpertTable* Table(int layer) override;  // null where an entry is undefined
  const ExpertStack* Stacked(int layer) override;

 private:
  MoeGeometry geometry_;
  std::vector<ExpertWeights> weights_;
  Grouping grouping_;
  std::map<int, std::unique_ptr<ExpertTable>> tables_;  // of the layers asked for
  std::map<int, std::optional<ExpertStack>> stacks_;    // likewise
  int layer_ = 0;
  std::vector<int> pending_;
  size_t next_ = 0;
};

// Sorts tokens by expert, then wi -> activation (-> times the gate's projection, where
// the expert has one) -> wo for each lease as it becomes ready. Differentiable where the
// weights and tokens are. Does not own the source.
class LocalExpertExecutor final : public ExpertExecutor {
 public:
  explicit LocalExpertExecutor(ExpertSource* source,
                               Activation activation = Activation::kRelu)
      : source_(source), activation_(activation) {}
  Activation activation() const override { return activation_; }
  at::Tensor Run(int layer, const at::Tensor& tokens_ND,
                 const at::Tensor& expert_ids_N) override;
  at::Tensor RunSorted(int layer, const at::Tensor& rows_ND,
                       std::span<const int64_t> offsets_E1) override;
  const ExpertTable* Table(int layer) override { return source_->Table(layer); }
  const ExpertStack* Stacked(int layer) override { return source_->Stacked(layer); }
  ExpertSource* Source() override { return source_; }

 private:
  ExpertSource* source_;
  Activation activation_;
};

// activation(x wi) wo, or (activation(x wi) * (x gate)) wo where `gate_FD` is defined.
at::Tensor ApplyFeedForward(Activation activation, const ExpertWeights& weights,
                            const at::Tensor& x_ND);

// The name of an expert's tensor in a checkpoint; `tensor` is "wi" or "wo", or where
// experts are gated "wi_0", "wi_1" or "wo".
std::string ExpertTensorName(const SwitchConfig& config, ExpertKey key,
                             const std::string& tensor);
// True for the name of any expert's tensor.
bool IsExpertTensor(const std::string& name);
// Collects the experts' weights from parameters. Throws DataError where one is missing.
std::vector<ExpertWeights> ExpertWeightsOf(const SwitchConfig& config,
                                           const Parameters& parameters);

}  // namespace routecast
