// Beam search's bookkeeping on scripted probabilities, and against all sequences there
// are.
#include "models/beam_search.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>

#include "common/random.h"

namespace routecast {
namespace {

constexpr int64_t kEnd = 1;

// The same next-token probabilities for every beam.
void StepAll(BeamSearch* search, const std::vector<double>& probs) {
  std::vector<float> all;
  for (size_t b = 0; b < search->running().size(); ++b) {
    for (double p : probs) all.push_back(static_cast<float>(std::log(p)));
  }
  search->Step(all);
}

using Ids = std::vector<int64_t>;

TEST(BeamSearch, TheFirstStepStartsFromOneBeam) {
  BeamSearch search({.num_beams = 2}, kEnd, 4);
  StepAll(&search, {0.1, 0.05, 0.5, 0.35});
  EXPECT_EQ(search.running()[0].ids, Ids({2}));
  EXPECT_EQ(search.running()[1].ids, Ids({3}));
  EXPECT_EQ(search.running()[1].source, 0);
}

TEST(BeamSearch, EqualScoresTakeTheLowerId) {
  BeamSearch search({.num_beams = 2}, kEnd, 4);
  StepAll(&search, {0.25, 0.25, 0.25, 0.25});
  EXPECT_EQ(search.running()[0].ids, Ids({0}));
  EXPECT_EQ(search.running()[1].ids, Ids({2}));  // 1 ended
}

TEST(BeamSearch, AnEndBehindTheBestBeamsDoesNotCount) {
  BeamSearch search({.num_beams = 1, .early_stopping = EarlyStopping::kWhenFull}, kEnd,
                    4);
  StepAll(&search, {0.1, 0.4, 0.5, 0.0});
  EXPECT_FALSE(search.done());
  StepAll(&search, {0.1, 0.6, 0.3, 0.0});
  ASSERT_TRUE(search.done());
  EXPECT_EQ(search.Best(1)[0].ids, Ids({2, 1}));
  EXPECT_NEAR(search.Best(1)[0].score, std::log(0.5 * 0.6) / 2, 1e-6);
}

TEST(BeamSearch, TheLastStepEndsAllBeams) {
  BeamSearch search({.num_beams = 2}, kEnd, 1);
  StepAll(&search, {0.1, 0.05, 0.5, 0.35});
  ASSERT_TRUE(search.done());
  EXPECT_EQ(search.Best(2)[0].ids, Ids({2}));
  EXPECT_EQ(search.Best(2)[1].ids, Ids({3}));
}

// The finished sequence has score log .6; what runs has log .4 and, at full length under
// a penalty of 2, could still reach log .4 / 16.
TEST(BeamSearch, NeverLooksAsFarAsTheFullLength) {
  const auto done_after_the_first = [](EarlyStopping rule) {
    BeamSearch search({.num_beams = 1, .length_penalty = 2, .early_stopping = rule}, kEnd,
                      4);
    StepAll(&search, {0.0, 0.6, 0.4, 0.0});
    return search.done();
  };
  EXPECT_TRUE(done_after_the_first(EarlyStopping::kHeuristic));
  EXPECT_TRUE(done_after_the_first(EarlyStopping::kWhenFull));
  EXPECT_FALSE(done_after_the_first(EarlyStopping::kNever));
}

TEST(BeamSearch, LengthPenaltyDecidesBetweenShortAndLong) {
  const auto best = [](double penalty) {
    BeamSearch search({.num_beams = 2,
                       .length_penalty = penalty,
                       .early_stopping = EarlyStopping::kNever},
                      kEnd, 3);
    StepAll(&search, {0.0, 0.45, 0.55, 0.0});
    StepAll(&search, {0.0, 0.0, 1.0, 0.0});
    StepAll(&search, {0.0, 0.7, 0.3, 0.0});
    return search.Best(1)[0].ids;
  };
  EXPECT_EQ(best(0), Ids({1}));  // .45 against .385
  EXPECT_EQ(best(2), Ids({2, 2, 1}));
}

// With as many beams as there are prefixes nothing is cut: the best of all sequences.
TEST(BeamSearch, WithEnoughBeamsFindsTheBestOfAllSequences) {
  constexpr int kVocabulary = 16, kSteps = 2;  // 15 running prefixes after a step
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const auto log_probs = [&](const Ids& prefix) {
      std::vector<float> p(kVocabulary);
      double sum = 0;
      for (int i = 0; i < kVocabulary; ++i) {
        uint64_t key = Mix(seed, static_cast<uint64_t>(i));
        for (int64_t id : prefix) key = Mix(key, static_cast<uint64_t>(id));
        p[static_cast<size_t>(i)] = static_cast<float>(0.01 + ToUnit(key));
        sum += p[static_cast<size_t>(i)];
      }
      for (float& x : p) x = static_cast<float>(std::log(x / sum));
      return p;
    };
    BeamSearch search(
        {.num_beams = 8, .length_penalty = 1, .early_stopping = EarlyStopping::kNever},
        kEnd, kSteps);
    while (!search.done()) {
      std::vector<float> all;
      for (const auto& beam : search.running()) {
        const auto p = log_probs(beam.ids);
        all.insert(all.end(), p.begin(), p.end());
      }
      search.Step(all);
    }
    // Every sequence of one or two tokens whose first is among the eight best: a beam's
    // prefixes are the best ones at its length.
    const auto first = log_probs({});
    std::multimap<float, Ids, std::greater<>> finished;
    std::vector<int> order(kVocabulary);
    for (int i = 0; i < kVocabulary; ++i) order[static_cast<size_t>(i)] = i;
    std::sort(order.begin(), order.end(), [&](int a, int b) {
      return first[static_cast<size_t>(a)] > first[static_cast<size_t>(b)];
    });
    int kept = 0;
    for (int i = 0; i < kVocabulary && kept < 8; ++i) {
      const int a = order[static_cast<size_t>(i)];
      const float score = first[static_cast<size_t>(a)];
      if (a == kEnd) {
        if (i < 8) finished.emplace(score, Ids({a}));
        continue;
      }
      ++kept;
      const auto second = log_probs({a});
      for (int b = 0; b < kVocabulary; ++b) {
        finished.emplace((score + second[static_cast<size_t>(b)]) / 2, Ids({a, b}));
      }
    }
    EXPECT_EQ(search.Best(1)[0].ids, finished.begin()->second) << "seed " << seed;
    EXPECT_NEAR(search.Best(1)[0].score, finished.begin()->first, 1e-5);
  }
}

TEST(BeamSearch, AVocabularyTooSmallIsADefect) {
  BeamSearch search({.num_beams = 3}, kEnd, 4);
  EXPECT_THROW(StepAll(&search, {0.2, 0.2, 0.2, 0.4}), std::logic_error);
}

}  // namespace
}  // namespace routecast
