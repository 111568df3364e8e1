#include "trainer/window_sampler.h"

#include <algorithm>

#include "common/errors.h"
#include "common/random.h"

namespace routecast {
namespace {

constexpr uint64_t kStreamKey = 0x73747265616dULL;
constexpr uint64_t kOrderKey = 0x6f72646572ULL;
// Micro-batches that are sorted by length together: large enough for little padding,
// small enough that an epoch's order stays random.
constexpr uint64_t kBucketMicroBatches = 16;

}  // namespace

WindowSampler::WindowSampler(std::vector<SampleGroup> groups,
                             WindowSamplerOptions options)
    : groups_(std::move(groups)), options_(options) {
  if (options_.micro_batch < 1 || options_.global_batch < options_.micro_batch ||
      options_.global_batch % options_.micro_batch != 0) {
    throw UsageError(
        ErrorText("--global_batch must be a positive multiple of --micro_batch",
                  std::to_string(options_.global_batch) + " and " +
                      std::to_string(options_.micro_batch),
                  ""));
  }
  if (groups_.empty()) {
    throw UsageError(ErrorText(
        "the traces have no sequence of two tokens or more in a train document", "",
        "collect more documents: most of a store's fall into the train part"));
  }
  uint64_t smallest = UINT64_MAX;
  for (const SampleGroup& g : groups_) {
    smallest = std::min<uint64_t>(smallest, g.pool->sequences.size());
  }
  first_micro_.push_back(0);
  for (size_t g = 0; g < groups_.size(); ++g) {
    quotas_.push_back(std::min<uint64_t>(groups_[g].pool->sequences.size(),
                                         kLargestToSmallest * smallest));
    first_micro_.push_back(first_micro_.back() + MicroOf(g));
  }
}

uint64_t WindowSampler::MicroOf(size_t group) const {
  const auto size = static_cast<uint64_t>(options_.micro_batch);
  return (quotas_[group] + size - 1) / size;
}

uint64_t WindowSampler::steps_per_epoch() const {
  return (first_micro_.back() + MicroPerStep() - 1) / MicroPerStep();
}

uint64_t WindowSampler::samples_per_epoch() const {
  uint64_t sum = 0;
  for (const uint64_t q : quotas_) sum += q;
  return sum;
}

uint64_t WindowSampler::StepMicroBatches(uint64_t step) const {
  const uint64_t first = step * MicroPerStep();
  return first >= first_micro_.back()
             ? 0
             : std::min(MicroPerStep(), first_micro_.back() - first);
}

std::vector<MicroBatch> WindowSampler::Step(uint64_t epoch, uint64_t step, int rank,
                                            int world) const {
  std::vector<MicroBatch> mine;
  const Permutation order(first_micro_.back(), Mix(options_.seed, kOrderKey, epoch));
  const uint64_t count = StepMicroBatches(step);
  for (auto j = static_cast<uint64_t>(rank); j < count;
       j += static_cast<uint64_t>(world)) {
    mine.push_back(Make(epoch, order(step * MicroPerStep() + j)));
  }
  return mine;
}

uint64_t WindowSampler::StreamAt(size_t group, uint64_t position) const {
  const uint64_t size = groups_[group].pool->sequences.size();
  const Permutation pass(size, Mix(options_.seed, kStreamKey, group, position / size));
  return pass(position % size);
}

MicroBatch WindowSampler::Make(uint64_t epoch, uint64_t number) const {
  const size_t g = static_cast<size_t>(
      std::upper_bound(first_micro_.begin(), first_micro_.end(), number) -
      first_micro_.begin() - 1);
  const SampleGroup& group = groups_[g];
  const uint64_t slot = number - first_micro_[g];
  const auto size = static_cast<uint64_t>(options_.micro_batch);
  const uint64_t bucket = slot / kBucketMicroBatches * kBucketMicroBatches * size;
  const uint64_t end = std::min(bucket + kBucketMicroBatches * size, quotas_[g]);
  std::vector<uint64_t> members;  // pool indices
  for (uint64_t i = bucket; i < end; ++i) {
    members.push_back(StreamAt(g, epoch * quotas_[g] + i));
  }
  // Equal lengths keep their random order; a window may occur twice where an epoch spans
  // two passes.
  std::stable_sort(members.begin(), members.end(), [&](uint64_t a, uint64_t b) {
    return group.pool->lengths[a] < group.pool->lengths[b];
  });
  MicroBatch batch;
  batch.id = Mix(epoch, number);
  batch.stack = group.stack;
  batch.source_layer = group.source_layer;
  batch.store = group.store;
  const uint64_t first = slot % kBucketMicroBatches * size;
  for (uint64_t i = first; i < std::min<uint64_t>(first + size, members.size()); ++i) {
    batch.sequences.push_back(group.pool->sequences[members[i]]);
  }
  return batch;
}

}  // namespace routecast
