#include "corpus/span_corruption.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <numeric>

#include "common/errors.h"

namespace routecast {
namespace {

constexpr Sentinels kSentinels{.first = 999, .count = 32};

std::vector<int32_t> Ids(int n) {
  std::vector<int32_t> ids(n);
  std::iota(ids.begin(), ids.end(), 10);
  return ids;
}

int CountSentinels(const std::vector<int32_t>& ids) {
  int count = 0;
  for (const int32_t id : ids) count += id > kSentinels.first - kSentinels.count;
  return count;
}

struct Case {
  int length;
  double density, mean_span;
};
class SpanCorruption : public testing::TestWithParam<Case> {};

TEST_P(SpanCorruption, InputsAndTargetsGiveTheIds) {
  const auto [n, density, mean] = GetParam();
  const auto ids = Ids(n);
  for (uint64_t seed = 0; seed < 50; ++seed) {
    const auto spans = CorruptSpans(ids, seed, {density, mean}, kSentinels);
    ASSERT_EQ(RestoreSpans(spans.inputs, spans.targets, kSentinels), ids) << seed;
  }
}

TEST_P(SpanCorruption, LengthsFollowTheDensity) {
  const auto [n, density, mean] = GetParam();
  const auto spans = CorruptSpans(Ids(n), 7, {density, mean}, kSentinels);
  const int noise = std::clamp<int>(std::lround(n * density), 1, n - 1);
  EXPECT_EQ(static_cast<int>(spans.inputs.size()), n - noise + spans.num_spans + 1);
  EXPECT_EQ(static_cast<int>(spans.targets.size()), noise + spans.num_spans + 1);
  EXPECT_EQ(CountSentinels(spans.inputs), spans.num_spans);
  EXPECT_EQ(CountSentinels(spans.targets), spans.num_spans);
}

TEST_P(SpanCorruption, SentinelsComeInOrderAndSpansAreNotEmpty) {
  const auto [n, density, mean] = GetParam();
  const auto spans = CorruptSpans(Ids(n), 3, {density, mean}, kSentinels);
  EXPECT_EQ(spans.inputs.back(), 1);
  EXPECT_EQ(spans.targets.back(), 1);
  EXPECT_EQ(spans.targets.front(), kSentinels.first);
  EXPECT_LE(spans.num_spans, kSentinels.count);
  int32_t next = kSentinels.first;
  for (size_t i = 0; i + 1 < spans.targets.size(); ++i) {
    if (spans.targets[i] != next) continue;
    --next;
    EXPECT_LT(spans.targets[i + 1], kSentinels.first - kSentinels.count + 1);
    EXPECT_NE(spans.targets[i + 1], 1);
  }
  EXPECT_EQ(kSentinels.first - next, spans.num_spans);
}

INSTANTIATE_TEST_SUITE_P(Shapes, SpanCorruption,
                         testing::Values(Case{2, 0.15, 3}, Case{3, 0.9, 1},
                                         Case{8, 0.5, 1}, Case{128, 0.15, 3},
                                         Case{128, 0.3, 3}, Case{512, 0.15, 3},
                                         Case{700, 0.5, 3}, Case{100, 0.01, 3}));

TEST(SpanCorruptionTest, SameSeedSameSpans) {
  const auto a = CorruptSpans(Ids(128), 5, {}, kSentinels);
  const auto b = CorruptSpans(Ids(128), 5, {}, kSentinels);
  const auto c = CorruptSpans(Ids(128), 6, {}, kSentinels);
  EXPECT_EQ(a.inputs, b.inputs);
  EXPECT_NE(a.inputs, c.inputs);
}

TEST(SpanCorruptionTest, FewerThanTwoIdsStay) {
  EXPECT_EQ(CorruptSpans({}, 1, {}, kSentinels).inputs, std::vector<int32_t>{1});
  const auto one = CorruptSpans(Ids(1), 1, {}, kSentinels);
  EXPECT_EQ(one.inputs, (std::vector<int32_t>{10, 1}));
  EXPECT_EQ(one.targets, std::vector<int32_t>{1});
}

// A brute-force count: 6 noise tokens in 3 spans have C(5,2) = 10 compositions, all as
// likely.
TEST(SpanCorruptionTest, PartitionsAreUniform) {
  std::map<std::vector<int>, int> seen;
  constexpr int kDraws = 20000;
  for (uint64_t seed = 0; seed < kDraws; ++seed) {
    const auto spans = CorruptSpans(Ids(20), seed, {0.3, 2}, kSentinels);
    ASSERT_EQ(spans.num_spans, 3);
    std::vector<int> lengths;
    for (const int32_t id : spans.targets) {
      if (id >= kSentinels.first - 2)
        lengths.push_back(0);
      else if (id != 1)
        ++lengths.back();
    }
    ++seen[lengths];
  }
  ASSERT_EQ(seen.size(), 10u);
  // Five standard deviations of a binomial with p = 0.1.
  for (const auto& [lengths, count] : seen) EXPECT_NEAR(count, kDraws / 10, 5 * 42.5);
}

TEST(SpanCorruptionTest, OptionsOutOfRangeAreUsageErrors) {
  EXPECT_THROW(CorruptSpans(Ids(9), 1, {.noise_density = 0}, kSentinels), UsageError);
  EXPECT_THROW(CorruptSpans(Ids(9), 1, {.noise_density = 1}, kSentinels), UsageError);
  EXPECT_THROW(CorruptSpans(Ids(9), 1, {.noise_density = NAN}, kSentinels), UsageError);
  EXPECT_THROW(CorruptSpans(Ids(9), 1, {.mean_span = 0.5}, kSentinels), UsageError);
  EXPECT_THROW(CorruptSpans(Ids(9), 1, {}, {.first = 9, .count = 0}), UsageError);
}

}  // namespace
}  // namespace routecast
