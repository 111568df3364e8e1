// The ring between a device and the host: order, bound, waiting, errors. A fake device
// ends copies when it likes; the same body runs on a card where there is one.
#include "collector/copy_ring.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "collector/routing_recorder.h"
#include "common/errors.h"
#include "tests/collector/late_copier.h"
#include "tests/models/device_test.h"

namespace routecast {
namespace {

constexpr int64_t kKiB = 1024;

at::Tensor Numbers(int64_t count, int64_t from) {
  return at::arange(from, from + count, at::kLong);
}

// Adds a set of 1 KiB whose numbers say which it is.
void AddSet(CopyRing* ring, int64_t number, std::vector<int64_t>* used) {
  ring->Add({Numbers(96, number)}, [=](const std::vector<at::Tensor>& on_host) {
    EXPECT_TRUE(at::equal(on_host[0], Numbers(96, number))) << "set " << number;
    used->push_back(number);
  });
}

std::vector<int64_t> FirstNumbers(int64_t count) {
  std::vector<int64_t> numbers;
  for (int64_t i = 0; i < count; ++i) numbers.push_back(i);
  return numbers;
}

class CopyRingOnDevices : public DeviceTest {};
ROUTECAST_INSTANTIATE_DEVICES(CopyRingOnDevices);

// Sources of all types and sizes are let go, and written over, right after.
TEST_P(CopyRingOnDevices, WhatWasHandedOverIsUsedInItsOrder) {
  LateCopier late(/*seed=*/1);
  const bool card = GetParam() != at::kCPU;
  CopyRing ring(8 * kKiB, card ? DeviceCopier() : &late);
  std::vector<int64_t> used;
  at::Tensor kept = On(at::zeros({500}, at::kFloat));
  for (int64_t i = 0; i < 300; ++i) {
    const int64_t count = i * 37 % 700;  // some are empty
    kept.fill_(i);
    ring.Add(
        {On(Numbers(count, i)), On(at::full({count, 3}, i % 2 == 0, at::kBool)),
         kept.slice(0, 0, 300, 2), On(at::full({2, count}, i, at::kBFloat16))},
        [&used, i, count](const std::vector<at::Tensor>& on_host) {
          EXPECT_TRUE(at::equal(on_host[0], Numbers(count, i))) << i;
          EXPECT_TRUE(at::equal(on_host[1], at::full({count, 3}, i % 2 == 0, at::kBool)));
          EXPECT_TRUE(at::equal(on_host[2], at::full({150}, i, at::kFloat))) << i;
          EXPECT_TRUE(at::equal(on_host[3], at::full({2, count}, i, at::kBFloat16)));
          used.push_back(i);
        });
    ring.HoldStream();
  }
  ring.Finish();
  EXPECT_EQ(used, FirstNumbers(300));
}

constexpr int64_t kRows = 5, kExperts = 9, kWidth = 8, kHeads = 2, kTopK = 3;

// What a model would offer: an encoder pass, then decoder steps that write over the
// tensors of the step before, as a recorded decoder step does.
class OfferedPasses {
 public:
  explicit OfferedPasses(at::Device device) : device_(device) {
    at::manual_seed(5);
    for (int i = 0; i < 8; ++i) Draw(i == 0 ? 6 : 1);
  }
  void Offer(RoutingRecorder* recorder) const {
    std::vector<at::Tensor> step;
    for (size_t p = 0; p < passes_.size(); ++p) {
      const Drawn& drawn = passes_[p];
      const int layers = p == 0 ? 1 : 2;
      if (p < 2) step.clear();
      for (size_t i = 0; i < drawn.tensors.size(); ++i) {
        if (p < 2)
          step.push_back(drawn.tensors[i].to(device_, /*non_blocking=*/false,
                                             /*copy=*/true));
        step[i].copy_(drawn.tensors[i]);
      }
      PassInfo pass{p == 0 ? Stack::kEncoder : Stack::kDecoder, drawn.ids, drawn.valid};
      recorder->OnPassBegin(pass);
      for (int l = 0; l < layers; ++l) {
        const int layer = p == 0 ? 0 : 1 + l;
        for (int cross = 0; cross < layers; ++cross) {
          recorder->OnAttention({layer, cross == 1, step[4]});
        }
        recorder->OnRouting(
            {layer, step[0], step[1], step[1].argmax(-1), step[2], step[3].gt(0.5)});
      }
      if (p > 0) pass.output_BTD = step[0];
      recorder->OnPassEnd(pass);
    }
  }

 private:
  struct Drawn {
    at::Tensor ids, valid;
    std::vector<at::Tensor> tensors;
  };
  void Draw(int64_t tokens) {
    passes_.push_back(
        {at::randint(3, 99, {kRows, tokens}, at::kLong),
         at::rand({kRows, tokens}) < 0.8,
         {at::randn({kRows, tokens, kWidth}), at::randn({kRows, tokens, kExperts}),
          at::rand({kRows, tokens}), at::rand({kRows, tokens}),
          at::rand({kRows, kHeads, tokens, 7}).softmax(-1)}});
  }
  at::Device device_;
  std::vector<Drawn> passes_;
};

// A ring that holds all that is handed over, none of which arrives by itself; one of a
// few sets; one that is too small for any.
TEST_P(CopyRingOnDevices, ARecordIsTheOneOfTheCpu) {
  const bool card = GetParam() != at::kCPU;
  const MoeGeometry geometry{1, 2, kExperts, 1, kWidth};
  const std::vector<bool> hidden_rows = {true, false, true, true, false};
  RecordOptions options;
  options.top_k = kTopK;
  options.output = options.attention = true;
  for (const int64_t bytes : {CopyRing::kBytes, 4 * kKiB, int64_t{1}}) {
    RoutingRecorder plain(geometry, options, hidden_rows);
    OfferedPasses(at::kCPU).Offer(&plain);
    LateCopier late(/*seed=*/bytes == CopyRing::kBytes ? 0 : 7);
    RoutingRecorder recorder(geometry, options, hidden_rows, bytes,
                             card ? DeviceCopier() : &late);
    OfferedPasses(device()).Offer(&recorder);
    for (const Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
      for (int b = 0; b < kRows; ++b) {
        RoutingSpan expected = plain.Take(stack, b), span = recorder.Take(stack, b);
        ASSERT_EQ(span.topk_probs.size(), expected.topk_probs.size());
        for (size_t i = 0; i < span.topk_probs.size(); ++i) {
          EXPECT_FLOAT_EQ(span.topk_probs[i], expected.topk_probs[i]);
        }
        span.topk_probs = expected.topk_probs;  // a card's softmax rounds otherwise
        EXPECT_GT(span.num_tokens, 0);
        EXPECT_TRUE(span == expected) << "row " << b << ", " << bytes << " bytes";
      }
    }
    EXPECT_TRUE(card || late.started() > 0);
  }
}

TEST(CopyRing, ARecorderThatLostACopyGivesNoRecord) {
  LateCopier late(0);
  late.FailAt(2);
  RoutingRecorder recorder({1, 2, kExperts, 1, kWidth}, {},
                           std::vector<bool>(kRows, true), CopyRing::kBytes, &late);
  OfferedPasses(at::kCPU).Offer(&recorder);
  EXPECT_THROW(recorder.Take(Stack::kEncoder, 0), EnvironmentError);
  EXPECT_THROW(recorder.Take(Stack::kEncoder, 0), EnvironmentError);
}

TEST(CopyRing, TensorsThatAreOnTheHostAreUsedAtOnceWhereTheyLie) {
  CopyRing ring;
  const at::Tensor tensor = Numbers(5, 0);
  bool used = false;
  ring.Add({tensor}, [&](const std::vector<at::Tensor>& on_host) {
    EXPECT_EQ(on_host[0].const_data_ptr(), tensor.const_data_ptr());
    used = true;
  });
  EXPECT_TRUE(used);
}

TEST(CopyRing, NothingWaitsBeforeTheRingIsFull) {
  LateCopier late(0);  // ends no copy by itself
  CopyRing ring(4 * kKiB, &late);
  std::vector<int64_t> used;
  for (int64_t i = 0; i < 4; ++i) AddSet(&ring, i, &used);
  EXPECT_EQ(late.waits(), 0);
  EXPECT_TRUE(used.empty());
}

TEST(CopyRing, AFullRingWaitsForItsOldestSetAlone) {
  LateCopier late(0);
  CopyRing ring(4 * kKiB, &late);
  std::vector<int64_t> used;
  for (int64_t i = 0; i < 12; ++i) {
    AddSet(&ring, i, &used);
    EXPECT_EQ(late.waits(), std::max<int64_t>(0, i - 3));
    EXPECT_EQ(used, FirstNumbers(late.waits()));
  }
  ring.Finish();
  EXPECT_EQ(used, FirstNumbers(12));
}

TEST(CopyRing, WhatHasArrivedIsUsedWithoutWaiting) {
  LateCopier late(0);
  CopyRing ring(4 * kKiB, &late);
  std::vector<int64_t> used;
  for (int64_t i = 0; i < 3; ++i) AddSet(&ring, i, &used);
  late.End(2);
  AddSet(&ring, 3, &used);
  EXPECT_EQ(used, FirstNumbers(2));
  EXPECT_EQ(late.waits(), 0);
}

TEST(CopyRing, ItsMemoryIsOfTheSizeAskedFor) {
  LateCopier late(3);
  CopyRing ring(4 * kKiB, &late);
  std::vector<int64_t> used;
  for (int64_t i = 0; i < 100; ++i) AddSet(&ring, i, &used);
  EXPECT_EQ(late.pinned(), (std::vector<int64_t>{4 * kKiB}));
}

TEST(CopyRing, ASetLargerThanTheRingGetsALargerOneAfterAllBeforeIt) {
  LateCopier late(0);
  CopyRing ring(kKiB, &late);
  std::vector<int64_t> used;
  AddSet(&ring, 0, &used);
  ring.Add({Numbers(kKiB, 1)}, [&](const std::vector<at::Tensor>& on_host) {
    EXPECT_TRUE(at::equal(on_host[0], Numbers(kKiB, 1)));
    used.push_back(1);
  });
  EXPECT_EQ(used, FirstNumbers(1));
  AddSet(&ring, 2, &used);
  ring.Finish();
  EXPECT_EQ(used, FirstNumbers(3));
  ASSERT_EQ(late.pinned().size(), 2u);
  EXPECT_LT(late.pinned()[1], 9 * kKiB);
}

TEST(CopyRing, ACopyThatFailedIsSaidEachTimeAndNothingBehindItIsUsed) {
  LateCopier late(0);
  CopyRing ring(8 * kKiB, &late);
  std::vector<int64_t> used;
  late.FailAt(1);
  for (int64_t i = 0; i < 3; ++i) AddSet(&ring, i, &used);
  EXPECT_THROW(ring.Finish(), EnvironmentError);
  EXPECT_THROW(ring.Finish(), EnvironmentError);
  EXPECT_THROW(AddSet(&ring, 3, &used), EnvironmentError);
  EXPECT_EQ(used, FirstNumbers(1));
}

TEST(CopyRing, WithoutPinnedMemoryNothingIsUnderWay) {
  LateCopier late(0);
  late.RefuseMemory();
  CopyRing ring(kKiB, &late);
  std::vector<int64_t> used;
  EXPECT_THROW(AddSet(&ring, 0, &used), EnvironmentError);
  ring.Finish();
  EXPECT_TRUE(used.empty());
}

TEST(CopyRing, TheStreamIsHeldByTheNewestCopy) {
  LateCopier late(0);
  CopyRing ring(8 * kKiB, &late);
  ring.HoldStream();  // nothing to wait for
  EXPECT_EQ(late.held(), -1);
  std::vector<int64_t> used;
  for (int64_t i = 0; i < 3; ++i) AddSet(&ring, i, &used);
  ring.HoldStream();
  EXPECT_EQ(late.held(), 2);
}

TEST(CopyRing, WhatIsUnderWayAtItsEndIsNotUsed) {
  LateCopier late(0);
  std::vector<int64_t> used;
  {
    CopyRing ring(8 * kKiB, &late);
    AddSet(&ring, 0, &used);
  }
  late.End(1);  // into memory that is still there
  EXPECT_TRUE(used.empty());
}

}  // namespace
}  // namespace routecast
