// Which windows a step trains on: a pure function of (seed, epoch, step), dealt to ranks.
// No state, no LibTorch: any rank of any world computes the same order.
//
// Windows of one (stack, source layer) form a group, and a micro-batch holds windows of
// one group and of similar length. Groups are streams: an endless row of permutations of
// the group's sequences, from which an epoch takes the group's quota. A group of many
// more sequences than the smallest (source -1 needs no router input, so every sequence
// serves it) is held to kLargestToSmallest times the smallest's quota, and goes on in
// the next epoch where it stopped.
//
// Ranks wait for the slowest of them at each step. So a step is made of runs of 2, 4 or 8
// micro-batches that cost about the same (padded tokens, a decoder's twice), of any
// groups, and the ranks share each run; a cheap run and a dear one follow each other, so
// that steps have about as many labels each.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
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

// Thread rule: const, any thread. Memory: the groups, and the order of 32 steps.
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
  uint64_t RunLength() const;            // micro-batches of like cost; 1 = no runs
  size_t GroupOf(uint64_t number) const;
  // Pool indices of the windows that are sorted by length together with micro-batch
  // `slot` of the group.
  std::vector<uint64_t> Bucket(uint64_t epoch, size_t group, uint64_t slot) const;
  std::vector<uint64_t> OrderOf(uint64_t epoch, uint64_t block) const;
  // Number of the micro-batch at a place of the epoch.
  uint64_t NumberAt(uint64_t epoch, uint64_t place) const;
  MicroBatch Make(uint64_t epoch, uint64_t number) const;
  // Index in the pool of the group's stream at `position`.
  uint64_t StreamAt(size_t group, uint64_t position) const;

  std::vector<SampleGroup> groups_;
  WindowSamplerOptions options_;
  std::vector<uint64_t> quotas_;
  std::vector<uint64_t> first_micro_;  // of each group, and the total at the end
  // What OrderOf last said.
  struct Order {
    uint64_t epoch = 0, block = 0;
    std::vector<uint64_t> numbers;
  };
  mutable std::mutex mutex_;
  mutable Order last_;
};

}  // namespace routecast
