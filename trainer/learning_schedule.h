// The learning rate of a step: a pure function of the step, but for the plateau, which
// lowers it by what validations said.
#pragma once

#include <cstdint>
#include <string>

#include "common/run_record.h"

namespace routecast {

struct LearningSchedule {
  // cosine: to `last_share` at the end of the run. restarts: cosine waves, the first of
  // `restart_steps`, each next one `restart_growth` times as long (Loshchilov, Hutter
  // 2017). plateau: x `plateau_factor` after `plateau_patience` validations without a
  // better one. constant. one_cycle: up from a 25th over 10 %, then a cosine to a
  // 250,000th (Smith, Topin 2018).
  std::string name = "cosine";
  int warmup_steps = 100;  // linear, at most a tenth of the run; not of one_cycle
  double last_share = 0.02;
  int64_t restart_steps = 0;  // 0 = a fifth of the run
  double restart_growth = 2;
  double plateau_factor = 0.5;
  int plateau_patience = 2;
  int restart_epochs = 0;  // > 0: restart_steps as epochs (InEpochsOf)
  // one_cycle: AdamW's beta1 goes from .95 to .85 while the rate rises, and back.
  bool cycle_beta1 = false;

  Json ToJson() const;
  void Validate() const;  // UsageError naming the flag
  // With restart_steps from restart_epochs, where those are said.
  LearningSchedule InEpochsOf(int64_t steps_per_epoch) const;
  // Share of the peak at `step` (from 0) of `steps`; `lowered`: times a plateau was hit.
  double Share(int64_t step, int64_t steps, int lowered) const;
  // AdamW's beta1 there; `otherwise` where it does not cycle.
  double Beta1(int64_t step, int64_t steps, double otherwise) const;
};

}  // namespace routecast
