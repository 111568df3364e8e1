// Batches made ahead: the same as those made in turn, no more of them than allowed,
// errors where they belong, and an end at once.
#include "trainer/batch_loader.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <thread>

#include "common/errors.h"
#include "tests/trainer/synthetic_traces.h"

namespace routecast {
namespace {

// Step s has the micro-batches 10 s, 10 s + 1 .., s % 3 of them.
std::vector<MicroBatch> SomeOf(int64_t step) {
  std::vector<MicroBatch> all;
  for (int64_t i = 0; i < step % 3; ++i) {
    all.push_back({static_cast<uint64_t>(10 * step + i), Stack::kEncoder, -1, {}});
  }
  return all;
}
SpeculationBatch Named(const MicroBatch& micro) {
  SpeculationBatch batch;
  batch.id = micro.id;
  return batch;
}
// Until `done`, for at most ten seconds.
template <typename Done>
bool Wait(const Done& done) {
  for (int i = 0; i < 10000 && !done(); ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return done();
}

TEST(BatchLoaderTest, KeepsTheOrderAndMarksTheEndOfAStep) {
  BatchLoader loader(3, 9, SomeOf, Named);
  for (int64_t step = 3; step < 9; ++step) {
    const auto expected = SomeOf(step);
    if (expected.empty()) {
      const LoadedBatch none = loader.Next();
      EXPECT_FALSE(none.batch);
      EXPECT_TRUE(none.last);
    }
    for (size_t i = 0; i < expected.size(); ++i) {
      const LoadedBatch next = loader.Next();
      ASSERT_TRUE(next.batch);
      EXPECT_EQ(next.batch->id, expected[i].id);
      EXPECT_EQ(next.last, i + 1 == expected.size());
    }
  }
  EXPECT_THROW(loader.Next(), std::logic_error);
}

TEST(BatchLoaderTest, MakesNoMoreThanItsDepthAhead) {
  std::atomic<int> made = 0;
  BatchLoader loader(
      0, 1000, [](int64_t) { return std::vector<MicroBatch>(1); },
      [&](const MicroBatch& micro) {
        ++made;
        return Named(micro);
      },
      /*depth=*/2);
  // Two wait, one waits for a place. A loader without bounds would have made hundreds by
  // the time that these three are seen.
  EXPECT_TRUE(Wait([&] { return made >= 3; }));
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_EQ(made, 3);
  loader.Next();
  EXPECT_TRUE(Wait([&] { return made == 4; }));
}

TEST(BatchLoaderTest, AnErrorComesWhereItsBatchWouldWithItsTypeAndText) {
  BatchLoader loader(1, 100, SomeOf, [](const MicroBatch& micro) {
    if (micro.id == 21) throw DataError("sequence 7 is damaged");
    return Named(micro);
  });
  EXPECT_EQ(loader.Next().batch->id, 10u);
  EXPECT_EQ(loader.Next().batch->id, 20u);
  for (int i = 0; i < 2; ++i) {
    try {
      loader.Next();
      ADD_FAILURE() << "no error";
    } catch (const DataError& e) {
      EXPECT_STREQ(e.what(), "sequence 7 is damaged");
    }
  }
}

TEST(BatchLoaderTest, EndsAtOnceWhereNobodyTakesItsBatches) {
  std::atomic<int> made = 0;
  {
    BatchLoader loader(1, int64_t{1} << 60, SomeOf, [&](const MicroBatch& micro) {
      ++made;
      return Named(micro);
    });
    EXPECT_TRUE(Wait([&] { return made > 0; }));
  }
  EXPECT_LE(made, 3);
}

size_t Threads() {
  const std::filesystem::directory_iterator tasks("/proc/self/task"), end;
  return static_cast<size_t>(std::distance(tasks, end));
}

bool Equal(const at::Tensor& a, const at::Tensor& b) {
  return a.defined() == b.defined() && (!a.defined() || at::equal(a, b));
}

// Real batches, large enough that LibTorch would fill them in parallel: equal to the bit
// to those that are made in turn while this thread reads the same data set, and the
// loader's thread brings no threads of its own.
TEST(BatchLoaderTest, BatchesAreThoseMadeInTurn) {
  at::set_num_threads(3);
  const SyntheticTraces traces =
      TraceSynthesizer(3, 8, 64, 200, 5).Make(80, 40, 64, /*every_hidden=*/true);
  TraceDataset ahead(traces.traces, traces.geometry),
      in_turn(traces.traces, traces.geometry);
  const WindowSampler sampler(GroupsOf(ahead, SplitPart::kTrain, WithHidden::kYes),
                              {7, 16, 32});
  const auto plan = [&](int64_t step) {
    return sampler.Step(0, static_cast<uint64_t>(step), 0, 1);
  };
  const auto steps = static_cast<int64_t>(sampler.steps_per_epoch());
  at::zeros({1 << 20}).add_(1);  // this thread's own pool is there now
  const size_t before = Threads();
  BatchLoader loader(0, steps, plan, [&](const MicroBatch& micro) {
    return MakeSpeculationBatch(micro, &ahead, WithHidden::kYes);
  });
  int64_t largest = 0;
  for (int64_t step = 0; step < steps; ++step) {
    for (const MicroBatch& micro : plan(step)) {
      const SpeculationBatch expected =
          MakeSpeculationBatch(micro, &in_turn, WithHidden::kYes);
      MakeSpeculationBatch(micro, &ahead, WithHidden::kYes);
      const LoadedBatch next = loader.Next();
      const RoutingWindow &a = next.batch->window, &b = expected.window;
      EXPECT_EQ(next.batch->id, expected.id);
      EXPECT_EQ(next.batch->num_labels, expected.num_labels);
      EXPECT_TRUE(Equal(next.batch->labels_BTH, expected.labels_BTH));
      EXPECT_TRUE(Equal(next.batch->documents_BT, expected.documents_BT));
      EXPECT_TRUE(Equal(a.token_ids_BT, b.token_ids_BT));
      EXPECT_TRUE(Equal(a.valid_BT, b.valid_BT));
      EXPECT_TRUE(Equal(a.experts_BTL, b.experts_BTL));
      EXPECT_TRUE(Equal(a.hidden_BTD, b.hidden_BTD));
      EXPECT_TRUE(Equal(a.context_BTD, b.context_BTD));
      EXPECT_TRUE(Equal(a.source_BSD, b.source_BSD));
      EXPECT_TRUE(Equal(a.source_valid_BS, b.source_valid_BS));
      if (a.hidden_BTD.defined()) largest = std::max(largest, a.hidden_BTD.numel());
    }
  }
  EXPECT_GT(largest, at::internal::GRAIN_SIZE) << "too small to tell";
  EXPECT_LE(Threads(), before + 1);
  at::set_num_threads(1);
}

}  // namespace
}  // namespace routecast
