// Which windows a step trains on: a pure function of (seed, epoch, step), dealt to ranks.
// No state, no LibTorch: any rank of any world computes the same order.
//
// Windows of one (stack, source layer) form a group, and a micro-batch holds windows of
// one group and of similar length. Groups are streams: an endless row of permutations of
// the group's sequences, from which an epoch takes the group's quota. A group of many
// more sequences than the smallest (source -1 needs no router input, so every sequence
// serves it) is held to kLargestToSmallest times the smallest's quota, and goes on in
// the next epoch where it stopped.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "common/routing.h"

namespace routecast {

// Sequences by their index in the data set, with their tokens in the group's stack.
struct SamplePool {
  std::vector<uint32_t> sequences;
  std::vector<uint32_t> lengths;  // parallel
};

struct SampleGroup {
  Stack stack = Stack::kEncoder;
  int source_layer = -1;
  std::shared_ptr<const SamplePool> pool;  // groups may share one; not empty
  int store = 0;                           // which data set, where several are trained on
};

// The compute unit: the same at any world size.
struct MicroBatch {
  uint64_t id = 0;  // unique over the run; what dropout is keyed by
  Stack stack = Stack::kEncoder;
  int source_layer = -1;
  std::vector<uint32_t> sequences;
  int store = 0;  // the group's
};

struct WindowSamplerOptions {
  uint64_t seed = 1;
  int micro_batch = 16;   // windows a micro-batch; the last of a group holds fewer
  int global_batch = 64;  // windows a step over all ranks; a multiple of micro_batch
};

// Thread rule: const, any thread. Memory: none beyond the groups.
class WindowSampler {
 public:
  static constexpr uint64_t kLargestToSmallest = 2;

  // Throws UsageError where global_batch is no positive multiple of micro_batch or where
  // there is no group.
  WindowSampler(std::vector<SampleGroup> groups, WindowSamplerOptions options);

  // Micro-batches of `step` (of its epoch) that belong to `rank`: number j of the step
  // goes to rank j mod world. Empty where a world is larger than the step.
  std::vector<MicroBatch> Step(uint64_t epoch, uint64_t step, int rank, int world) const;
  // How many micro-batches the step has over all ranks.
  uint64_t StepMicroBatches(uint64_t step) const;
  uint64_t steps_per_epoch() const;
  uint64_t samples_per_epoch() const;
  // Windows a group gives to each epoch.
  uint64_t Quota(size_t group) const { return quotas_[group]; }
  size_t num_groups() const { return groups_.size(); }
  const std::vector<SampleGroup>& groups() const { return groups_; }

 private:
  uint64_t MicroPerStep() const {
    return static_cast<uint64_t>(options_.global_batch / options_.micro_batch);
  }
  uint64_t MicroOf(size_t group) const;  // micro-batches a group gives to each epoch
  MicroBatch Make(uint64_t epoch, uint64_t number) const;
  // Index in the pool of the group's stream at `position`.
  uint64_t StreamAt(size_t group, uint64_t position) const;

  std::vector<SampleGroup> groups_;
  WindowSamplerOptions options_;
  std::vector<uint64_t> quotas_;
  std::vector<uint64_t> first_micro_;  // of each group, and the total at the end
};

}  // namespace routecast
