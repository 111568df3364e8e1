// Easy targets first. A published window asks for one layer; ours asks for all leads at
// once, so what is ordered here is the target (sequence, source layer, lead), by the mean
// loss of the first-order Markov table over its tokens: near layers come before far ones
// and regular sequences before others. A pure function of (store, seed, epoch): which
// windows a step holds does not change, nor does a world's size change what counts.
// Thread rule: const, the training thread.
#pragma once

#include <memory>
#include <vector>

#include "models/baseline_predictors.h"
#include "trainer/speculation_batch.h"

namespace routecast {

// min(1, .3 + .7 epoch / epochs): the part of the targets that counts.
double CurriculumShare(uint64_t epoch, int epochs);

class Curriculum {
 public:
  // All targets count from epoch `epochs` (> 0) on. The order is measured on up to 256
  // sequences of each group, drawn by `seed`: time and memory do not grow with the store.
  Curriculum(int epochs, std::shared_ptr<const BaselineTables> tables,
             TraceDataset* dataset, const std::vector<SampleGroup>& groups,
             uint64_t seed);
  // Nats above which a target does not count; infinite where all do.
  double Limit(uint64_t epoch) const;
  // Labels of harder targets become -100. Before anything else changes the batch.
  void Apply(uint64_t epoch, SpeculationBatch* batch) const;

 private:
  // Mean loss of the targets of a batch [B,H]; NaN where a target has no label.
  at::Tensor Losses(const SpeculationBatch& batch) const;
  int epochs_;
  std::unique_ptr<ExpertPredictor> markov_;
  std::vector<double> sorted_;  // losses of the targets that were measured
};

}  // namespace routecast
