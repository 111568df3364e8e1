#include "common/random.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace routecast {
namespace {

TEST(Permutation, IsABijectionForEverySize) {
  for (uint64_t n : {1, 2, 3, 7, 64, 65, 1000}) {
    const Permutation permutation(n, 42);
    std::vector<bool> seen(n, false);
    for (uint64_t i = 0; i < n; ++i) {
      const uint64_t element = permutation(i);
      ASSERT_LT(element, n);
      EXPECT_FALSE(seen[element]) << "n=" << n;
      seen[element] = true;
    }
  }
}

TEST(Permutation, DependsOnTheKeyAndMixes) {
  const Permutation a(1000, 1), b(1000, 2);
  int equal = 0, fixed = 0;
  for (uint64_t i = 0; i < 1000; ++i) {
    equal += a(i) == b(i);
    fixed += a(i) == i;
  }
  EXPECT_LT(equal, 10);  // expected 1; ten and more has probability below 1e-6
  EXPECT_LT(fixed, 10);
}

TEST(Mix, OrderAndCountOfCoordinatesMatter) {
  EXPECT_NE(Mix(1, 2), Mix(2, 1));
  EXPECT_NE(Mix(1, 2), Mix(1, 2, 0));
  EXPECT_EQ(Mix(1, 2, 3), Mix(1, 2, 3));
}

TEST(Draws, HaveTheMomentsTheyShould) {
  constexpr int kDraws = 200000;
  double unit = 0, normal = 0, square = 0;
  for (uint64_t i = 0; i < kDraws; ++i) {
    const double u = ToUnit(Mix(7, i));
    ASSERT_GE(u, 0);
    ASSERT_LT(u, 1);
    const double z = ToNormal(Mix(9, i));
    unit += u;
    normal += z;
    square += z * z;
  }
  // Six standard errors.
  EXPECT_NEAR(unit / kDraws, 0.5, 6 * 0.2887 / std::sqrt(kDraws));
  EXPECT_NEAR(normal / kDraws, 0, 6 / std::sqrt(kDraws));
  EXPECT_NEAR(square / kDraws, 1, 6 * std::sqrt(2.0 / kDraws));
}

TEST(ToRange, StaysBelowAndReachesBothEnds) {
  EXPECT_EQ(ToRange(0, 10), 0u);
  EXPECT_EQ(ToRange(~uint64_t{0}, 10), 9u);
}

}  // namespace
}  // namespace routecast
