// One optimizer step of all members of a model: each member's gradient is clipped by its
// own norm and stepped at its own rate, and a running average of the parameters is kept
// where one is wanted. Thread rule: the training thread.
#pragma once

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
  // and counts in no norm. Returns the largest member's gradient
  // norm before clipping. Throws std::logic_error naming the first tensor whose gradient
  // is not finite; nothing is changed then.
  double Step(double share, int64_t epoch = 0);
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
  std::vector<double> Norms(int64_t epoch) const;  // by member
  Parameters parameters_, averages_;
  std::vector<Part> parts_;
  std::vector<MemberOptions> training_;
  double ema_;
  AdamW adamw_;
};

}  // namespace routecast
