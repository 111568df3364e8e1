#include "trainer/window_sampler.h"

#include <algorithm>
#include <map>
#include <utility>

#include "common/errors.h"
#include "common/random.h"

namespace routecast {
namespace {

constexpr uint64_t kStreamKey = 0x73747265616dULL;
constexpr uint64_t kOrderKey = 0x6f72646572ULL;
// Micro-batches that are sorted by length together: large enough for little padding,
// small enough that an epoch's order stays random.
constexpr uint64_t kBucketMicroBatches = 16;
constexpr uint64_t kRunKey = 0x72756eULL;
constexpr uint64_t kLongestRun = 8;
// Steps whose micro-batches are sorted by cost together, to be cut into runs.
constexpr uint64_t kBlockSteps = 32;

// About what a micro-batch takes, in tokens of an encoder. Measured (milliseconds of one
// thread): `hidden` 3.3 + .0173 a padded token, in decoders 9.5 + .042; `interlayer` -18
// + .22 and -7 + .38.
uint64_t CostOf(Stack stack, uint64_t padded_tokens) {
  constexpr uint64_t kEveryPass = 100, kDecoder = 2;
  return (kEveryPass + padded_tokens) * (stack == Stack::kDecoder ? kDecoder : 1);
}

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

uint64_t WindowSampler::RunLength() const {
  // Two runs a step or more: all of one length would be a narrow sample.
  const uint64_t step = MicroPerStep();
  uint64_t length = 1;
  while (length < kLongestRun && step % (2 * length) == 0 && 4 * length <= step) {
    length *= 2;
  }
  return length;
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
  const uint64_t count = StepMicroBatches(step);
  for (auto j = static_cast<uint64_t>(rank); j < count;
       j += static_cast<uint64_t>(world)) {
    mine.push_back(Make(epoch, NumberAt(epoch, step * MicroPerStep() + j)));
  }
  return mine;
}

uint64_t WindowSampler::StreamAt(size_t group, uint64_t position) const {
  const uint64_t size = groups_[group].pool->sequences.size();
  const Permutation pass(size, Mix(options_.seed, kStreamKey, group, position / size));
  return pass(position % size);
}

std::vector<uint64_t> WindowSampler::OrderOf(uint64_t epoch, uint64_t block) const {
  const uint64_t size = kBlockSteps * MicroPerStep(), length = RunLength();
  const uint64_t first = block * size;
  const uint64_t end = std::min(first + size, first_micro_.back());
  const Permutation order(first_micro_.back(), Mix(options_.seed, kOrderKey, epoch));
  std::vector<std::pair<uint64_t, uint64_t>> by_cost;  // cost, number
  std::map<std::pair<size_t, uint64_t>, std::vector<uint64_t>> buckets;
  for (uint64_t place = first; place < end; ++place) {
    const uint64_t number = order(place);
    uint64_t cost = 0;
    if (length > 1) {
      const size_t g = GroupOf(number);
      const uint64_t slot = number - first_micro_[g];
      auto& members = buckets[{g, slot / kBucketMicroBatches}];
      if (members.empty()) members = Bucket(epoch, g, slot);
      const auto batch = static_cast<uint64_t>(options_.micro_batch);
      const uint64_t begin = slot % kBucketMicroBatches * batch;
      const uint64_t last = std::min<uint64_t>(begin + batch, members.size()) - 1;
      cost = CostOf(groups_[g].stack,
                    (last + 1 - begin) * groups_[g].pool->lengths[members[last]]);
    }
    by_cost.emplace_back(cost, number);
  }
  // Equal ones keep their random order.
  std::stable_sort(by_cost.begin(), by_cost.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<uint64_t> numbers;
  const auto append = [&](uint64_t run) {
    // Every other run backwards: no rank gets the dearest of all.
    const bool forward = numbers.size() / length % 2 == 0;
    for (uint64_t i = 0; i < length; ++i) {
      const uint64_t at = run * length + (forward ? i : length - 1 - i);
      numbers.push_back(by_cost[at].second);
    }
  };
  if (length == 1) {
    for (const auto& [cost, number] : by_cost) numbers.push_back(number);
    return numbers;
  }
  // A cheap run and a dear one follow each other, so that steps have about as many labels
  // each.
  const uint64_t runs = by_cost.size() / length, couples = runs / 2;
  const Permutation shuffled(std::max<uint64_t>(1, couples),
                             Mix(options_.seed, kRunKey, epoch, block));
  for (uint64_t c = 0; c < couples; ++c) {
    append(shuffled(c));
    append(runs - 1 - shuffled(c));
  }
  if (runs % 2 == 1) append(couples);
  for (uint64_t i = runs * length; i < by_cost.size(); ++i) {
    numbers.push_back(by_cost[i].second);  // too few for a run: the epoch's last ones
  }
  return numbers;
}

uint64_t WindowSampler::NumberAt(uint64_t epoch, uint64_t place) const {
  const uint64_t size = kBlockSteps * MicroPerStep(), block = place / size;
  const std::lock_guard lock(mutex_);
  if (last_.numbers.empty() || last_.epoch != epoch || last_.block != block) {
    last_ = {epoch, block, OrderOf(epoch, block)};
  }
  return last_.numbers[place % size];
}

size_t WindowSampler::GroupOf(uint64_t number) const {
  return static_cast<size_t>(
      std::upper_bound(first_micro_.begin(), first_micro_.end(), number) -
      first_micro_.begin() - 1);
}

std::vector<uint64_t> WindowSampler::Bucket(uint64_t epoch, size_t g,
                                            uint64_t slot) const {
  const auto size = static_cast<uint64_t>(options_.micro_batch);
  const uint64_t bucket = slot / kBucketMicroBatches * kBucketMicroBatches * size;
  const uint64_t end = std::min(bucket + kBucketMicroBatches * size, quotas_[g]);
  std::vector<uint64_t> members;
  for (uint64_t i = bucket; i < end; ++i) {
    members.push_back(StreamAt(g, epoch * quotas_[g] + i));
  }
  // Equal lengths keep their random order; a window may occur twice where an epoch spans
  // two passes.
  const std::vector<uint32_t>& lengths = groups_[g].pool->lengths;
  std::stable_sort(members.begin(), members.end(),
                   [&](uint64_t a, uint64_t b) { return lengths[a] < lengths[b]; });
  return members;
}

MicroBatch WindowSampler::Make(uint64_t epoch, uint64_t number) const {
  const size_t g = GroupOf(number);
  const SampleGroup& group = groups_[g];
  const uint64_t slot = number - first_micro_[g];
  const auto size = static_cast<uint64_t>(options_.micro_batch);
  const std::vector<uint64_t> members = Bucket(epoch, g, slot);
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
