// Where the weights of experts come from. F expert width, D model width, N tokens.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <span>
#include <utility>

#include "common/routing.h"
#include "models/activation.h"

namespace routecast {

struct ExpertTable;  // expert_gemv.h
struct ExpertStack;  // expert_stack.h

struct ExpertWeights {
  at::Tensor wi_FD;  // first projection, [d_ff, d_model]; gated: the activated one, wi_0
  at::Tensor wo_DF;  // second projection, [d_model, d_ff]
  at::Tensor gate_FD{};  // gated experts only: wi_1, [d_ff, d_model]; else undefined
};

// The right to use one expert's weights until destroyed (pins its slot). Move-only.
class ExpertLease {
 public:
  ExpertLease() = default;
  ExpertLease(int expert, ExpertWeights weights, std::function<void()> release)
      : expert_(expert), weights_(std::move(weights)), release_(std::move(release)) {}
  ExpertLease(ExpertLease&& o) noexcept
      : expert_(o.expert_),
        weights_(std::move(o.weights_)),
        release_(std::exchange(o.release_, nullptr)) {}
  ExpertLease& operator=(ExpertLease&& o) noexcept {
    if (this != &o) {
      if (release_) release_();
      expert_ = o.expert_;
      weights_ = std::move(o.weights_);
      release_ = std::exchange(o.release_, nullptr);
    }
    return *this;
  }
  ~ExpertLease() {
    if (release_) release_();
  }
  int expert() const { return expert_; }
  const ExpertWeights& weights() const { return weights_; }

 private:
  int expert_ = -1;
  ExpertWeights weights_;
  std::function<void()> release_;
};

// Thread rule: the forward thread. One layer at a time: Begin, then Next once an expert.
// Top-1 outputs are disjoint, so the order of leases changes no bit.
class ExpertSource {
 public:
  virtual ~ExpertSource() = default;
  // The distinct experts (ascending) that `layer` (global MoE layer) is about to run.
  virtual void Begin(int layer, std::span<const int> experts) = 0;
  // The next expert that is ready; waits for one where none is. Leases of one layer may
  // be released in any order. Throws EnvironmentError when the weights cannot be brought.
  virtual ExpertLease Next() = 0;
  // How many leases of a layer may be held at once.
  virtual int LeasesAtOnce() { return 1; }
  // Where all experts of `layer` lie, if they are there and stay; else null.
  virtual const ExpertTable* Table(int layer) { return nullptr; }
  // All experts of `layer` in one tensor a projection, where they lie so, stay there, and
  // grouped products are worth it; else null.
  virtual const ExpertStack* Stacked(int layer) { return nullptr; }
};

// Executes a layer's experts: tokens [N,D] with their expert ids -> outputs [N,D].
// REQUIRES expert_ids_N int64 on the CPU; tokens on the model's device.
class ExpertExecutor {
 public:
  virtual ~ExpertExecutor() = default;
  // What it computes between the projections: SwitchModel's constructor compares.
  virtual Activation activation() const { return Activation::kRelu; }
  virtual at::Tensor Run(int layer, const at::Tensor& tokens_ND,
                         const at::Tensor& expert_ids_N) = 0;
  // The same for tokens sorted by expert: expert e has the rows offsets[e] to
  // offsets[e+1] of rows_ND (on the model's device; rows behind the last offset belong to
  // nobody). Returns [offsets.back(),D]. REQUIRES one row at least.
  virtual at::Tensor RunSorted(int layer, const at::Tensor& rows_ND,
                               std::span<const int64_t> offsets_E1);
  // As ExpertSource's: null where experts cannot be run without the host.
  virtual const ExpertTable* Table(int layer) { return nullptr; }
  virtual const ExpertStack* Stacked(int layer) { return nullptr; }
  // Whose leases run the experts, for who runs them on this device himself; null where
  // experts are elsewhere.
  virtual ExpertSource* Source() { return nullptr; }
};

}  // namespace routecast
