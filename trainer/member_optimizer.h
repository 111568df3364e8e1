// One optimizer step of all members of a model: each member's gradient is clipped by its
// own norm and stepped at its own rate, and a running average of the parameters is kept
// where one is wanted. Thread rule: the training thread. M members.
#pragma once

#include <optional>
#include <vector>

#include "models/speculation_model.h"
#include "trainer/adamw.h"
#include "trainer/speculation_options.h"

namespace routecast {

class MemberOptimizer {
 public:
  // Shares the model's parameters; `training` as of TrainingOf. Gradients must exist.
  // UsageError where `freeze` names layers and the model has none.
  MemberOptimizer(const SpeculationModel& model, std::vector<MemberOptions> training,
                  double beta1, double beta2, double ema, LayerFreezing freeze = {});

  // `share` of each member's peak learning rate. What is frozen in `epoch` stays as it is
  // and counts in no norm. CUDA: enqueued; the host does not wait. Where a gradient is
  // not finite no parameter and no moment changes: broken() and RequireFinite say so.
  // `beta1`: of this step, instead of the constructor's.
  void Step(double share, int64_t epoch = 0, std::optional<double> beta1 = {});
  // Of the last step: float32 [] on the parameters' device, 1 where a gradient was not
  // finite, else 0. Undefined before the first step.
  const at::Tensor& broken() const { return broken_; }
  // Throws DivergedError naming the first tensor whose gradient the last step found not
  // finite. Waits for the device, as the next one does.
  void RequireFinite() const;
  // The largest member's gradient norm of the last step, before clipping.
  double GradientNorm() const;
  // Highest rate at `share`: what logs show.
  double LearningRate(double share) const;

  AdamW& adamw() { return adamw_; }
  // The averaged parameters by name; empty where none are kept. Shared: a checkpoint's
  // values may be copied in.
  const Parameters& averages() const { return averages_; }
  // Exchanges parameters and averages; twice is nothing. Nothing where none are kept.
  void SwapAverages();

 private:
  // Parameters of one member that are released together.
  struct Part {
    size_t member = 0;
    int64_t released_at = 0;  // epoch
    std::vector<ParameterSlice> slices;
  };
  static std::vector<Part> PartsOf(const SpeculationModel& model,
                                   const LayerFreezing& freeze);
  std::vector<AdamWGroup> Groups() const;
  // Slices of member `m` that are trained in `epoch`, in the order of parts_.
  std::vector<ParameterSlice> TrainedSlices(size_t m, int64_t epoch) const;
  Parameters parameters_, averages_;
  std::vector<Part> parts_;
  std::vector<MemberOptions> training_;
  double ema_;
  AdamW adamw_;
  at::Tensor clip_M;  // float64
  // Of the last step, on the device.
  int64_t epoch_ = 0;
  std::vector<at::Tensor> slice_norms_;  // by member, [slices]
  at::Tensor norm_M, broken_;
};

}  // namespace routecast
