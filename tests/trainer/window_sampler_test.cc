// The order of windows: a pure function of (seed, epoch, step), whatever the world.
#include "trainer/window_sampler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>

#include "common/errors.h"
#include "common/random.h"

namespace routecast {
namespace {

using testing::UnorderedElementsAreArray;

std::shared_ptr<const SamplePool> Pool(uint32_t count) {
  auto pool = std::make_shared<SamplePool>();
  for (uint32_t i = 0; i < count; ++i) {
    pool->sequences.push_back(1000 + i);
    pool->lengths.push_back(8 + static_cast<uint32_t>(ToRange(Mix(7, i), 120)));
  }
  return pool;
}

std::vector<SampleGroup> Groups() {
  const auto many = Pool(900), few = Pool(101);
  return {{Stack::kEncoder, -1, many},
          {Stack::kEncoder, 0, few},
          {Stack::kDecoder, 0, few},
          {Stack::kDecoder, 1, few}};
}

WindowSampler Sampler(uint64_t seed = 3) {
  return WindowSampler(Groups(), {seed, /*micro_batch=*/4, /*global_batch=*/32});
}

// Every micro-batch of an epoch in the order of (step, number), from a world's ranks.
std::vector<MicroBatch> Epoch(const WindowSampler& sampler, uint64_t epoch, int world) {
  std::vector<MicroBatch> all;
  for (uint64_t step = 0; step < sampler.steps_per_epoch(); ++step) {
    std::vector<std::vector<MicroBatch>> ranks;
    for (int r = 0; r < world; ++r) ranks.push_back(sampler.Step(epoch, step, r, world));
    const uint64_t count = sampler.StepMicroBatches(step);
    for (uint64_t j = 0; j < count; ++j) {
      all.push_back(
          ranks[j % static_cast<uint64_t>(world)].at(j / static_cast<uint64_t>(world)));
    }
  }
  return all;
}

bool Same(const std::vector<MicroBatch>& a, const std::vector<MicroBatch>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](const MicroBatch& x, const MicroBatch& y) {
                      return x.id == y.id && x.stack == y.stack &&
                             x.source_layer == y.source_layer &&
                             x.sequences == y.sequences;
                    });
}

TEST(WindowSampler, TheOrderIsTheSameAtEveryWorld) {
  const WindowSampler sampler = Sampler();
  for (const uint64_t epoch : {0, 1, 5}) {
    const std::vector<MicroBatch> one = Epoch(sampler, epoch, 1);
    for (const int world : {2, 3, 4, 6, 8}) {
      EXPECT_TRUE(Same(one, Epoch(sampler, epoch, world))) << world << " ranks";
    }
  }
}

TEST(WindowSampler, RanksShareAStepWithoutOverlap) {
  const WindowSampler sampler = Sampler();
  for (const int world : {2, 3, 8, 20}) {
    std::set<uint64_t> ids;
    size_t count = 0;
    for (int r = 0; r < world; ++r) {
      for (const MicroBatch& m : sampler.Step(0, 2, r, world)) {
        ids.insert(m.id);
        ++count;
      }
    }
    EXPECT_EQ(ids.size(), count);
    EXPECT_EQ(count, sampler.StepMicroBatches(2)) << world << " ranks";
  }
}

TEST(WindowSampler, AnEpochHoldsEverySmallGroupOnce) {
  const WindowSampler sampler = Sampler();
  std::map<std::pair<Stack, int>, std::vector<uint32_t>> seen;
  for (const MicroBatch& m : Epoch(sampler, 4, 1)) {
    auto& list = seen[{m.stack, m.source_layer}];
    list.insert(list.end(), m.sequences.begin(), m.sequences.end());
  }
  const std::vector<SampleGroup> groups = Groups();
  for (size_t g = 1; g < groups.size(); ++g) {
    EXPECT_THAT((seen[{groups[g].stack, groups[g].source_layer}]),
                UnorderedElementsAreArray(groups[g].pool->sequences));
  }
  EXPECT_EQ((seen[{Stack::kEncoder, -1}].size()), 202u) << "twice the smallest group";
}

TEST(WindowSampler, AGroupHeldBackComesThroughWhollyOverEpochs) {
  const WindowSampler sampler = Sampler();
  std::vector<uint32_t> seen;
  for (uint64_t epoch = 0; epoch < 5; ++epoch) {  // 5 * 202 >= 900
    for (const MicroBatch& m : Epoch(sampler, epoch, 1)) {
      if (m.source_layer != -1) continue;
      seen.insert(seen.end(), m.sequences.begin(), m.sequences.end());
    }
  }
  EXPECT_EQ(std::set<uint32_t>(seen.begin(), seen.end()).size(), 900u);
}

TEST(WindowSampler, EpochsAndSeedsDiffer) {
  const WindowSampler sampler = Sampler(), other = Sampler(/*seed=*/4);
  EXPECT_FALSE(Same(Epoch(sampler, 0, 1), Epoch(sampler, 1, 1)));
  EXPECT_FALSE(Same(Epoch(sampler, 0, 1), Epoch(other, 0, 1)));
  std::set<uint64_t> ids;
  for (uint64_t epoch = 0; epoch < 3; ++epoch) {
    for (const MicroBatch& m : Epoch(sampler, epoch, 1)) {
      EXPECT_TRUE(ids.insert(m.id).second) << "dropout must differ by epoch";
    }
  }
}

TEST(WindowSampler, MicroBatchesHoldSimilarLengths) {
  const std::vector<SampleGroup> groups = {{Stack::kEncoder, 0, Pool(2048)}};
  const WindowSampler sampler(groups, {1, 16, 64});
  uint64_t tokens = 0, padded = 0;
  for (const MicroBatch& m : Epoch(sampler, 0, 1)) {
    uint32_t longest = 0;
    for (const uint32_t s : m.sequences) {
      const uint32_t length = groups[0].pool->lengths[s - 1000];
      tokens += length;
      longest = std::max(longest, length);
    }
    padded += uint64_t{longest} * m.sequences.size();
  }
  EXPECT_LT(padded, tokens * 110 / 100) << "random batches would pad by 80 %";
}

uint64_t CostOf(const MicroBatch& m) {
  static const std::vector<SampleGroup> groups = Groups();
  uint32_t longest = 0;
  for (const uint32_t s : m.sequences) {
    longest = std::max(longest, groups[0].pool->lengths[s - 1000]);
  }
  return (100 + m.sequences.size() * longest) * (m.stack == Stack::kDecoder ? 2 : 1);
}

TEST(WindowSampler, RanksGetAboutTheSameWorkInEachStep) {
  const WindowSampler sampler = Sampler();
  for (const int world : {2, 4}) {
    uint64_t slowest = 0, sum = 0;
    for (uint64_t step = 0; step + 1 < sampler.steps_per_epoch(); ++step) {
      uint64_t most = 0;
      for (int r = 0; r < world; ++r) {
        uint64_t cost = 0;
        for (const MicroBatch& m : sampler.Step(0, step, r, world)) cost += CostOf(m);
        most = std::max(most, cost);
        sum += cost;
      }
      slowest += most;
    }
    EXPECT_LT(slowest * static_cast<uint64_t>(world), sum * 106 / 100)
        << world << " ranks; dealt at random it is 1.2 to 1.4 times";
  }
}

TEST(WindowSampler, AStepHoldsWindowsOfSeveralGroups) {
  const WindowSampler sampler(Groups(), {3, /*micro_batch=*/4, /*global_batch=*/16});
  uint64_t groups = 0;
  for (uint64_t step = 0; step < sampler.steps_per_epoch(); ++step) {
    std::set<std::pair<Stack, int>> held;
    for (const MicroBatch& m : sampler.Step(0, step, 0, 1)) {
      held.insert({m.stack, m.source_layer});
    }
    groups += held.size();
  }
  EXPECT_GT(groups * 10, sampler.steps_per_epoch() * 20)
      << "of four micro-batches drawn one by one 2.7 would be of another group";
}

TEST(WindowSampler, RefusesBatchesThatDoNotDivide) {
  EXPECT_THROW(WindowSampler(Groups(), {1, 16, 40}), UsageError);
  EXPECT_THROW(WindowSampler(Groups(), {1, 0, 0}), UsageError);
  EXPECT_THROW(WindowSampler({}, {1, 16, 64}), UsageError);
}

}  // namespace
}  // namespace routecast
