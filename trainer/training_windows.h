// Which windows each step of a training has, and what is made of them before a model sees
// them: curriculum and augmentation. Functions of (options, step, rank), whatever ran
// before.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "comm/communicator.h"
#include "models/baseline_predictors.h"
#include "trainer/curriculum.h"
#include "trainer/speculation_batch.h"
#include "trainer/speculation_options.h"

namespace routecast {

class TrainingWindows {
 public:
  // Of the train parts of `stores` (borrowed), for a model that looks at `context`
  // layers.
  TrainingWindows(const SpeculationOptions& options, std::vector<TraceDataset*> stores,
                  WithHidden hidden, int context, RankInfo rank);
  // Orders targets by the first store's tables, where a curriculum is asked for; before
  // the first batch is prepared.
  void FitCurriculum(std::shared_ptr<const BaselineTables> tables);

  int64_t steps_per_epoch() const {
    return static_cast<int64_t>(sampler_.steps_per_epoch());
  }
  uint64_t EpochOf(int64_t step) const;
  std::vector<MicroBatch> Of(int64_t step) const;  // of this rank
  // Thread rule: any thread.
  SpeculationBatch Read(const MicroBatch& micro) const;
  // What is trained of it in that step. Thread rule: the training thread.
  void Prepare(int64_t step, SpeculationBatch* batch) const;

 private:
  const SpeculationOptions options_;
  const std::vector<TraceDataset*> stores_;
  const WithHidden hidden_;
  const int context_;
  const RankInfo rank_;
  WindowSampler sampler_;
  std::optional<Curriculum> curriculum_;
};

}  // namespace routecast
