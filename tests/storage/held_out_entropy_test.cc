#include "storage/held_out_entropy.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>

#include "common/random.h"

namespace routecast {
namespace {

constexpr int kExperts = 8, kTokens = 50;

// Two decoder layers whose experts `choose(token, expert before, draw)` gives.
std::vector<double> BitsOf(
    const std::function<uint64_t(uint64_t, uint64_t, uint64_t)>& choose,
    const WorkObserver& on_work = {}) {
  HeldOutEntropy entropy({0, 2, kExperts, 1, 0});
  for (uint64_t i = 0; i < 400; ++i) {
    RoutingTrace trace;
    trace.group_id = Mix(i);
    RoutingSpan& s = trace.decoder;
    s.num_tokens = kTokens;
    s.num_layers = 2;
    for (uint64_t t = 0; t < kTokens; ++t) {
      s.token_ids.push_back(static_cast<uint32_t>(ToRange(Mix(i, t), 20)));
    }
    for (uint64_t l = 0; l < 2; ++l) {
      for (uint64_t t = 0; t < kTokens; ++t) {
        const uint64_t before = l == 0 ? 0 : s.expert_ids[t];
        s.expert_ids.push_back(static_cast<uint16_t>(
            choose(s.token_ids[t], before, Mix(i, l, t)) % kExperts));
      }
    }
    entropy.Add(trace);
  }
  return entropy.Bits(on_work);
}

TEST(HeldOutEntropy, IsThreeBitsOfEightExpertsDrawnAtRandom) {
  for (const double bits : BitsOf([](auto, auto, auto draw) { return draw; })) {
    EXPECT_NEAR(bits, 3, 0.1);
  }
}

TEST(HeldOutEntropy, IsNextToNothingOfAFunctionOfTokenAndExpertBefore) {
  const auto bits =
      BitsOf([](auto token, auto before, auto) { return Mix(token, before); });
  EXPECT_LT(bits[0], 0.05);
  EXPECT_LT(bits[1], 0.05);
}

TEST(HeldOutEntropy, IsOneBitWhereTwoExpertsAreLeft) {
  const auto bits = BitsOf([](auto token, auto before, auto draw) {
    return Mix(token, before % 2) + draw % 2;
  });
  EXPECT_NEAR(bits[1], 1, 0.05);
}

// One document, or near-duplicates alone: nothing is held out that something was learnt
// for. A model of nothing took 12 bits for one of four experts.
TEST(HeldOutEntropy, OfOneGroupOfDocumentsIsNotKnown) {
  HeldOutEntropy entropy({1, 1, 4, 1, 0});
  RoutingTrace trace;
  trace.group_id = 5;
  trace.decoder.num_tokens = 3;
  trace.decoder.num_layers = 1;
  trace.decoder.expert_ids = {1, 2, 1};
  entropy.Add(trace);
  entropy.Add(trace);
  EXPECT_EQ(entropy.Bits(), (std::vector<double>{-1, -1}));
}

// Of a large store it takes minutes, in each fold.
TEST(HeldOutEntropy, SaysHowFarItIs) {
  std::vector<double> shares;
  BitsOf([](auto, auto, auto draw) { return draw; },
         [&](double share) { shares.push_back(share); });
  ASSERT_FALSE(shares.empty());
  EXPECT_EQ(shares.front(), 0);
  EXPECT_EQ(shares.back(), 1);
  EXPECT_TRUE(std::is_sorted(shares.begin(), shares.end()));
  double largest = 0;
  for (size_t i = 1; i < shares.size(); ++i)
    largest = std::max(largest, shares[i] - shares[i - 1]);
  EXPECT_LT(largest, 0.05) << "between two looks";
}

// Each token has half of the experts for itself, and with each of them another one in the
// layer behind: more contexts, of more factors, than a coder's model may have.
TEST(HeldOutEntropy, OfTooManyContextsIsNotKnown) {
  constexpr uint64_t kMany = 1024, kIds = 48, kRounds = 3;
  HeldOutEntropy entropy({0, 2, static_cast<int>(kMany), 1, 0});
  for (uint64_t i = 0; i < kIds * kRounds; ++i) {
    const uint64_t token = i % kIds;
    std::vector<uint16_t> own;
    for (uint64_t e = 0; e < kMany; ++e) {
      if (Mix(token, e) % 2 == 0) own.push_back(static_cast<uint16_t>(e));
    }
    RoutingTrace trace;
    trace.group_id = Mix(i);
    RoutingSpan& s = trace.decoder;
    s.num_tokens = static_cast<int>(own.size());
    s.num_layers = 2;
    s.token_ids.assign(own.size(), static_cast<uint32_t>(token));
    s.expert_ids = own;
    std::rotate(own.begin(), own.begin() + 1, own.end());
    s.expert_ids.insert(s.expert_ids.end(), own.begin(), own.end());
    entropy.Add(trace);
  }
  for (const double bits : entropy.Bits()) EXPECT_LT(bits, 0);
}

TEST(HeldOutEntropy, OfALayerWithoutIdsIsNotKnown) {
  EXPECT_LT(HeldOutEntropy({1, 0, kExperts, 1, 0}).Bits()[0], 0);
}

}  // namespace
}  // namespace routecast
