// Weights of experts in the order of experts: both forms of the loops against each other,
// and what a coder asks for against plain lists.
#include "storage/expert_frequencies.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "common/random.h"
#include "storage/expert_frequency_loops.h"

namespace routecast {
namespace {

constexpr uint32_t kUntouched = 0xABABABAB;  // what the loops do not write

// Base weights, at least 1 each, that sum to kBaseScale, and a dense row of them.
struct Case {
  Case(size_t experts, uint64_t key, double share) : num_experts(experts) {
    const size_t padded = Padded(experts);
    base.assign(padded, 0);
    std::fill_n(base.begin(), experts, uint16_t{1});
    // Halves of what is left, so that some weights are large and most are 1.
    for (uint32_t left = kBaseScale - static_cast<uint32_t>(experts), i = 0; left > 0;) {
      const uint32_t part = left < 16 ? left : left / 2;
      const size_t at = ToRange(Mix(key, 1, i++), experts);
      base[at] = static_cast<uint16_t>(base[at] + part);
      left -= part;
    }
    cumulative.assign(padded + kLanes, 0x7777);  // behind E: anything
    cumulative[0] = 0;
    for (size_t e = 0; e < experts; ++e) {
      cumulative[e + 1] = static_cast<uint16_t>(cumulative[e] + base[e]);
    }
    row.assign(padded, FactorRows::kAbsent);
    for (size_t e = 0; e < experts; ++e) {
      if (ToUnit(Mix(key, 2, e)) >= share) continue;
      const auto drawn = static_cast<int>(ToRange(Mix(key, 3, e), 2 * kMaxFactor + 1));
      const uint64_t extreme = Mix(key, 4, e) % 4;  // half of them
      row[e] = static_cast<int8_t>(extreme == 0   ? kMaxFactor
                                   : extreme == 1 ? -kMaxFactor
                                                  : drawn - kMaxFactor);
    }
  }
  FactorRows::View dense() const { return {nullptr, nullptr, row.data()}; }
  std::vector<RowEntry> List() const {
    std::vector<RowEntry> list;
    for (size_t e = 0; e < num_experts; ++e) {
      if (row[e] == FactorRows::kAbsent) continue;
      list.push_back({static_cast<uint16_t>(e), row[e]});
    }
    return list;
  }
  // The weight of an expert that the row has: never none.
  uint32_t Scaled(size_t e) const {
    const uint64_t scaled = uint64_t{base[e]} * FactorTimes(row[e]) / 65536;
    return static_cast<uint32_t>(std::max<uint64_t>(1, scaled));
  }
  bool Has(size_t e) const { return row[e] != FactorRows::kAbsent; }

  size_t num_experts;
  std::vector<uint16_t> base, cumulative;
  std::vector<int8_t> row;
};

std::vector<Case> Cases() {
  std::vector<Case> cases;
  uint64_t key = 0;
  for (const size_t experts :
       {1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 128, 255, 256, 1000, 1023, 1024}) {
    for (const double share : {0.0, 0.1, 0.5, 0.9, 1.0}) {
      for (int i = 0; i < 4; ++i) cases.emplace_back(experts, ++key, share);
    }
  }
  return cases;
}

struct alignas(64) Ends {
  Ends() { at.fill(kUntouched); }
  std::array<uint32_t, kMaxCodedExperts + kLanes> at;
};

TEST(FrequencyLoopsTest, WideAndScalarMakeTheSame) {
  const FrequencyLoops& scalar = ScalarFrequencyLoops();
  const FrequencyLoops* wide = WideFrequencyLoops();
  if (wide == nullptr) GTEST_SKIP() << "this CPU has no AVX2";
  for (const Case& c : Cases()) {
    SCOPED_TRACE(c.num_experts);
    const size_t padded = Padded(c.num_experts);
    Ends one, other;
    for (const int8_t* row : {static_cast<const int8_t*>(nullptr), c.row.data()}) {
      scalar.fill_all(c.base.data(), row, padded, one.at.data());
      wide->fill_all(c.base.data(), row, padded, other.at.data());
      ASSERT_EQ(one.at, other.at) << "all";
    }
    for (const size_t first : {size_t{0}, c.num_experts / 2, c.num_experts - 1}) {
      for (const uint32_t amount : {12345u, 0u - 7}) {
        scalar.add_from(first, amount, padded, one.at.data());
        wide->add_from(first, amount, padded, other.at.data());
        ASSERT_EQ(one.at, other.at) << "from " << first;
      }
    }
    const uint16_t* cumulative = c.cumulative.data();
    ASSERT_EQ(scalar.fill_own(cumulative, c.num_experts, c.row.data(), one.at.data()),
              wide->fill_own(cumulative, c.num_experts, c.row.data(), other.at.data()));
    ASSERT_EQ(one.at, other.at) << "own";
    scalar.fill_rest(cumulative, c.num_experts, c.row.data(), one.at.data());
    wide->fill_rest(cumulative, c.num_experts, c.row.data(), other.at.data());
    ASSERT_EQ(one.at, other.at) << "rest";
  }
}

// Either form of the loops under the questions of a coder.
class ExpertFrequenciesTest : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    const bool scalar = std::string(GetParam()) == "Scalar";
    loops_ = scalar ? &ScalarFrequencyLoops() : WideFrequencyLoops();
    if (loops_ == nullptr) GTEST_SKIP() << "this CPU has no AVX2";
  }
  static void ExpectThese(const ExpertFrequencies& made,
                          const std::vector<uint32_t>& weights) {
    uint32_t at = 0;
    for (uint16_t e = 0; e < weights.size(); ++e) {
      ASSERT_EQ(made.StartOf(e), at) << "expert " << e;
      ASSERT_EQ(made.weight(e), weights[e]) << "expert " << e;
      if (weights[e] > 0) {
        ASSERT_EQ(made.Locate(at), e);
        ASSERT_EQ(made.Locate(at + weights[e] / 2), e);
        ASSERT_EQ(made.Locate(at + weights[e] - 1), e);
      }
      at += weights[e];
    }
    ASSERT_EQ(made.total(), at);
  }
  const FrequencyLoops* loops_ = nullptr;
};

TEST_P(ExpertFrequenciesTest, AllAreAsAPlainListHasThem) {
  for (const Case& c : Cases()) {
    SCOPED_TRACE(c.num_experts);
    std::vector<uint32_t> expected;
    for (size_t e = 0; e < c.num_experts; ++e) {
      expected.push_back(c.Has(e) ? c.Scaled(e) : c.base[e]);
    }
    const std::vector<RowEntry> list = c.List();
    ExpertFrequencies made(*loops_);
    made.FillAll(c.base.data(), Padded(c.num_experts), c.dense());
    ASSERT_NO_FATAL_FAILURE(ExpectThese(made, expected)) << "dense";
    made.FillAll(c.base.data(), Padded(c.num_experts),
                 {list.data(), list.data() + list.size(), nullptr});
    ASSERT_NO_FATAL_FAILURE(ExpectThese(made, expected)) << "listed";
  }
}

TEST_P(ExpertFrequenciesTest, OwnAndRestPartTheBase) {
  for (const Case& c : Cases()) {
    SCOPED_TRACE(c.num_experts);
    std::vector<uint32_t> own, rest;
    uint32_t base_of_own = 0;
    for (size_t e = 0; e < c.num_experts; ++e) {
      own.push_back(c.Has(e) ? c.Scaled(e) : 0);
      rest.push_back(c.Has(e) ? 0 : c.base[e]);
      if (c.Has(e)) base_of_own += c.base[e];
    }
    ExpertFrequencies made(*loops_);
    ASSERT_EQ(made.FillOwn(c.cumulative.data(), c.num_experts, c.row.data()),
              base_of_own);
    ASSERT_NO_FATAL_FAILURE(ExpectThese(made, own)) << "own";
    made.FillRest(c.cumulative.data(), c.num_experts, c.row.data());
    ASSERT_NO_FATAL_FAILURE(ExpectThese(made, rest)) << "rest";
  }
}

TEST_P(ExpertFrequenciesTest, RemovedOnesHaveNoPlace) {
  for (const Case& c : Cases()) {
    SCOPED_TRACE(c.num_experts);
    ExpertFrequencies made(*loops_);
    made.FillAll(c.base.data(), Padded(c.num_experts), c.dense());
    std::vector<uint32_t> expected;
    for (uint16_t e = 0; e < c.num_experts; ++e) expected.push_back(made.weight(e));
    for (uint64_t i = 0; i < 5; ++i) {
      const auto e = static_cast<uint16_t>(ToRange(Mix(c.base[0], i), c.num_experts));
      made.Remove(e);
      expected[e] = 0;
      ASSERT_NO_FATAL_FAILURE(ExpectThese(made, expected)) << "without " << e;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Loops, ExpertFrequenciesTest, testing::Values("Scalar", "Wide"),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace routecast
