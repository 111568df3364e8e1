#include "common/random.h"

#include <bit>
#include <cmath>
#include <numbers>

namespace routecast {

double ToNormal(uint64_t bits) {
  const double u = 1.0 - ToUnit(bits);  // (0, 1]
  const double v = ToUnit(Mix(bits));
  return std::sqrt(-2.0 * std::log(u)) * std::cos(2.0 * std::numbers::pi * v);
}

Permutation::Permutation(uint64_t n, uint64_t key) : n_(n) {
  const int bits = n <= 1 ? 1 : 64 - std::countl_zero(n - 1);
  half_bits_ = (bits + 1) / 2;
  for (size_t i = 0; i < round_keys_.size(); ++i) round_keys_[i] = Mix(key, i);
}

uint64_t Permutation::operator()(uint64_t position) const {
  const uint64_t mask = (uint64_t{1} << half_bits_) - 1;
  uint64_t x = position;
  do {  // cycle walking: the domain is at most 4n, so a few steps on average
    uint64_t left = x >> half_bits_, right = x & mask;
    for (uint64_t key : round_keys_) {
      const uint64_t next = left ^ (Mix(key, right) & mask);
      left = right;
      right = next;
    }
    x = (left << half_bits_) | right;
  } while (x >= n_);
  return x;
}

}  // namespace routecast
