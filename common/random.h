// Counter-based randomness: every value is a pure function of its coordinates (seed,
// epoch, sample, layer, position ...), never of a generator's state, a rank or a thread.
#pragma once

#include <array>
#include <cstdint>

namespace routecast {

// A step of SplitMix64 (Steele, Lea, Flood 2014): increment, then finaliser; a bijection.
inline uint64_t Mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}
// Hash of any number of coordinates; order matters.
template <typename... Rest>
inline uint64_t Mix(uint64_t first, uint64_t second, Rest... rest) {
  return Mix(Mix(first) ^ (second + 0x632be59bd9b4e019ULL),
             static_cast<uint64_t>(rest)...);
}
inline uint64_t Mix(uint64_t first, uint64_t second) {
  return Mix(Mix(first) ^ (second + 0x632be59bd9b4e019ULL));
}
// 53 bits -> [0, 1).
inline double ToUnit(uint64_t bits) {
  return static_cast<double>(bits >> 11) * 0x1.0p-53;
}
// Uniform integer in [0, n), n > 0 (multiply-shift; bias below 2^-32 for n < 2^32).
inline uint64_t ToRange(uint64_t bits, uint64_t n) {
  return static_cast<uint64_t>((static_cast<unsigned __int128>(bits) * n) >> 64);
}
// A standard normal from two uniform draws (Box-Muller) at coordinate `bits`.
double ToNormal(uint64_t bits);

// A pseudo-random permutation of [0, n) as a keyed Feistel network with cycle walking:
// position -> element without memory. Thread-safe, immutable.
class Permutation {
 public:
  Permutation(uint64_t n, uint64_t key);
  uint64_t operator()(uint64_t position) const;  // REQUIRES position < n
  uint64_t size() const { return n_; }

 private:
  uint64_t n_;
  int half_bits_;
  std::array<uint64_t, 4> round_keys_;
};

}  // namespace routecast
