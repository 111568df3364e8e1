#include "models/attention_loops.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

namespace routecast {

#if defined(__x86_64__)

namespace {

constexpr int64_t kLeastPacked = 4;  // fewer queries do not pay for the packing of keys

#define ROUTECAST_INLINE [[gnu::always_inline]] inline

template <int kWidth>
struct Vectors {
  typedef float Floats __attribute__((vector_size(kWidth * sizeof(float))));
  typedef int32_t Ints __attribute__((vector_size(kWidth * sizeof(float))));
};
typedef float Four __attribute__((vector_size(4 * sizeof(float))));

constexpr int64_t kLine = 16;   // numbers of a cache line
constexpr int64_t kAhead = 16;  // rows that are fetched ahead

int64_t RoundUp(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

const float* MaskOf(const AttentionCall& c, int64_t b) {
  return c.mask == nullptr ? nullptr : c.mask + b * c.mask_at;
}

// y[kR, kC vectors] = x[kR,depth] panel[depth, kC vectors]; each sum in order of depth.
template <int kWidth, int kC, int kR>
ROUTECAST_INLINE void Tile(const float* x, int64_t x_stride, const float* panel,
                           int64_t panel_stride, int64_t depth, float* y,
                           int64_t y_stride) {
  using Floats = typename Vectors<kWidth>::Floats;
  Floats sums[kR][kC] = {};
  for (int64_t i = 0; i < depth; ++i, panel += panel_stride) {
    Floats columns[kC];
#pragma GCC unroll 4
    for (int c = 0; c < kC; ++c) {
      std::memcpy(&columns[c], panel + c * kWidth, sizeof(Floats));
    }
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      const float number = x[r * x_stride + i];
#pragma GCC unroll 4
      for (int c = 0; c < kC; ++c) sums[r][c] += number * columns[c];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kC; ++c) {
      std::memcpy(y + r * y_stride + c * kWidth, &sums[r][c], sizeof(Floats));
    }
  }
}

// e^x for x <= 0, to about an ulp: 2^n e^r by a Taylor sum to r^7, |r| <= ln 2 / 2. What
// would be no normal number is 0; no number stays none.
template <int kWidth>
ROUTECAST_INLINE void Exp(typename Vectors<kWidth>::Floats* x) {
  using Floats = typename Vectors<kWidth>::Floats;
  using Ints = typename Vectors<kWidth>::Ints;
  constexpr float kLeast = -87.33654f;   // ln of the least normal number
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded
  constexpr float kHigh = 0.693359375f;  // of ln 2: few bits, so that n * kHigh is exact
  constexpr float kLow = -2.12194440e-4f;  // the rest of ln 2
  const auto none = *x < kLeast;
  const Floats shifted = *x * 1.44269504f + kRound;
  const Floats n = shifted - kRound;
  const Floats r = (*x - n * kHigh) - n * kLow;
  Floats sum = r * (1.0f / 5040) + 1.0f / 720;
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  Ints bits;  // the integer is in the lowest bits of `shifted`
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;
  Floats power;
  std::memcpy(&power, &bits, sizeof power);
  *x = none ? Floats{} : sum * power;
}

// All lanes of x in one, by halves: one after the other, they would wait for each other.
template <int kWidth, class Join>
ROUTECAST_INLINE float Joined(const typename Vectors<kWidth>::Floats& x,
                              const Join& join) {
  if constexpr (kWidth == 1) {
    return x[0];
  } else {
    typename Vectors<kWidth / 2>::Floats low, high;
    std::memcpy(&low, &x, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&x) + sizeof low, sizeof high);
    join(high, &low);
    return Joined<kWidth / 2>(low, join);
  }
}

// scores[0, keys) + (bias + mask) -> e to them less the largest; the rest up to `padded`,
// whole vectors -> 0. Returns one over their sum.
template <int kWidth>
ROUTECAST_INLINE float Exponentials(float* scores, const float* bias, const float* mask,
                                    int64_t keys, int64_t padded) {
  using Floats = typename Vectors<kWidth>::Floats;
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  for (int64_t i = keys; i < padded; ++i) scores[i] = kNone;
  Floats largest = Floats{} + kNone;
  for (int64_t i = 0; i < padded; i += kWidth) {
    Floats x, b = {}, m = {};
    std::memcpy(&x, scores + i, sizeof x);
    if (i + kWidth <= keys) {
      std::memcpy(&b, bias + i, sizeof b);
      if (mask != nullptr) std::memcpy(&m, mask + i, sizeof m);
    } else {
      for (int64_t k = i; k < keys; ++k) b[k - i] = bias[k];
      for (int64_t k = i; mask != nullptr && k < keys; ++k) m[k - i] = mask[k];
    }
    x += b + m;
    largest = x > largest ? x : largest;
    std::memcpy(scores + i, &x, sizeof x);
  }
  const float most = Joined<kWidth>(
      largest, [](const auto& other, auto* x) { *x = other > *x ? other : *x; });
  Floats sums = {};
  for (int64_t i = 0; i < padded; i += kWidth) {
    Floats x;
    std::memcpy(&x, scores + i, sizeof x);
    x -= most;
    Exp<kWidth>(&x);
    sums += x;
    std::memcpy(scores + i, &x, sizeof x);
  }
  return 1 / Joined<kWidth>(sums, [](const auto& other, auto* x) { *x += other; });
}

// rows[count,width] -> panels of kPanel rows, transposed: [width,kPanel] each; rows that
// are not there are 0.
template <int kPanel>
ROUTECAST_INLINE void PackTransposed(const float* rows, int64_t stride, int64_t count,
                                     int64_t width, float* to) {
  for (int64_t first = 0; first < count; first += kPanel, to += width * kPanel) {
    const int64_t there = std::min<int64_t>(kPanel, count - first);
    const int64_t fours = width / 4 * 4;
    int64_t r = 0;
    for (; r + 4 <= there; r += 4) {
      const float* from = rows + (first + r) * stride;
      for (int64_t w = 0; w < fours; w += 4) {
        // Rows are far apart: the machine does not see that they are a stream.
        if (w % kLine == 0 && r + kAhead + 4 <= there) {
          for (int i = 0; i < 4; ++i)
            __builtin_prefetch(from + (kAhead + i) * stride + w);
        }
        Four row[4], pairs[4];
        for (int i = 0; i < 4; ++i)
          std::memcpy(&row[i], from + i * stride + w, sizeof(Four));
        pairs[0] = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
        pairs[1] = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
        pairs[2] = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
        pairs[3] = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
        row[0] = __builtin_shufflevector(pairs[0], pairs[2], 0, 1, 4, 5);
        row[1] = __builtin_shufflevector(pairs[0], pairs[2], 2, 3, 6, 7);
        row[2] = __builtin_shufflevector(pairs[1], pairs[3], 0, 1, 4, 5);
        row[3] = __builtin_shufflevector(pairs[1], pairs[3], 2, 3, 6, 7);
        for (int i = 0; i < 4; ++i) {
          std::memcpy(to + (w + i) * kPanel + r, &row[i], sizeof(Four));
        }
      }
      for (int64_t w = fours; w < width; ++w) {
        for (int i = 0; i < 4; ++i) to[w * kPanel + r + i] = from[i * stride + w];
      }
    }
    for (; r < kPanel; ++r) {
      for (int64_t w = 0; w < width; ++w) {
        to[w * kPanel + r] = r < there ? rows[(first + r) * stride + w] : 0;
      }
    }
  }
}

// rows[count,width] -> panels of kPanel columns: [count,kPanel] each; columns that are
// not there are 0.
template <int kPanel>
ROUTECAST_INLINE void PackColumns(const float* rows, int64_t stride, int64_t count,
                                  int64_t width, float* to) {
  for (int64_t first = 0; first < width; first += kPanel) {
    const auto there = static_cast<size_t>(std::min<int64_t>(kPanel, width - first));
    for (int64_t r = 0; r < count; ++r, to += kPanel) {
      const float* from = rows + r * stride + first;
      for (int64_t w = 0; w < kPanel && r + kAhead < count; w += kLine) {
        __builtin_prefetch(from + kAhead * stride + w);
      }
      if (there == kPanel) {
        std::memcpy(to, from, kPanel * sizeof(float));
        continue;
      }
      std::memcpy(to, from, there * sizeof(float));
      std::fill(to + there, to + kPanel, 0.0f);
    }
  }
}

template <int kWidth, int kC>
struct Room {
  static constexpr int kPanel = kWidth * kC;
  explicit Room(const AttentionCall& c)
      : keys_padded(RoundUp(c.keys, kPanel)),
        depth_padded(RoundUp(c.depth, kPanel)),
        keys(static_cast<size_t>(keys_padded * c.depth)),
        values(static_cast<size_t>(c.keys * depth_padded)),
        scores(static_cast<size_t>(6 * keys_padded)),
        mixed(static_cast<size_t>(6 * depth_padded)) {}
  int64_t keys_padded, depth_padded;
  std::vector<float> keys, values, scores, mixed;
};

template <int kWidth, int kC, int kR>
ROUTECAST_INLINE void Rows(const AttentionCall& c, int64_t b, int64_t h, int64_t t,
                           Room<kWidth, kC>* room) {
  constexpr int kPanel = kWidth * kC;
  const float* q = c.q + b * c.q_at.b + h * c.q_at.h + t * c.q_at.t;
  float* scores = room->scores.data();
  // What none of these rows sees has no weight: left out, it changes no bit.
  const int64_t keys = c.causal ? std::min(c.keys, c.keys - c.queries + t + kR) : c.keys;
  const int64_t padded = RoundUp(keys, kPanel);
  for (int64_t p = 0; p < padded; p += kPanel) {
    Tile<kWidth, kC, kR>(q, c.q_at.t, room->keys.data() + p * c.depth, kPanel, c.depth,
                         scores + p, room->keys_padded);
  }
  float scales[kR];
  for (int r = 0; r < kR; ++r) {
    float* row = scores + r * room->keys_padded;
    scales[r] = Exponentials<kWidth>(
        row, c.bias + b * c.bias_at.b + h * c.bias_at.h + (t + r) * c.bias_at.t,
        MaskOf(c, b), keys, padded);
    if (c.weights != nullptr) {
      float* to = c.weights + ((b * c.heads + h) * c.queries + t + r) * c.keys;
      for (int64_t k = 0; k < keys; ++k) to[k] = row[k] * scales[r];
    }
  }
  float* mixed = room->mixed.data();
  for (int64_t p = 0; p < room->depth_padded; p += kPanel) {
    Tile<kWidth, kC, kR>(scores, room->keys_padded, room->values.data() + p * c.keys,
                         kPanel, keys, mixed + p, room->depth_padded);
  }
  for (int r = 0; r < kR; ++r) {
    const float* row = mixed + r * room->depth_padded;
    float* to = c.out + ((b * c.queries + t + r) * c.heads + h) * c.depth;
    for (int64_t k = 0; k < c.depth; ++k) to[k] = row[k] * scales[r];
  }
}

// Heads [begin, end), counted over all sequences.
template <int kWidth, int kC>
ROUTECAST_INLINE void Heads(const AttentionCall& c, int64_t begin, int64_t end) {
  constexpr int kPanel = kWidth * kC;
  Room<kWidth, kC> room(c);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / c.heads, h = i % c.heads;
    PackTransposed<kPanel>(c.k + b * c.k_at.b + h * c.k_at.h, c.k_at.t, c.keys, c.depth,
                           room.keys.data());
    PackColumns<kPanel>(c.v + b * c.v_at.b + h * c.v_at.h, c.v_at.t, c.keys, c.depth,
                        room.values.data());
    int64_t t = 0;
    for (; t + 6 <= c.queries; t += 6) Rows<kWidth, kC, 6>(c, b, h, t, &room);
    for (; t + 2 <= c.queries; t += 2) Rows<kWidth, kC, 2>(c, b, h, t, &room);
    for (; t < c.queries; ++t) Rows<kWidth, kC, 1>(c, b, h, t, &room);
  }
}

// One query over keys as they lie, where packing them would be most of the work.
// REQUIRES depth in whole vectors. `scores`: room for the keys in whole vectors.
template <int kWidth>
ROUTECAST_INLINE void OneQuery(const AttentionCall& c, int64_t b, int64_t h, int64_t t,
                               float* scores) {
  using Floats = typename Vectors<kWidth>::Floats;
  const float* q = c.q + b * c.q_at.b + h * c.q_at.h + t * c.q_at.t;
  const float* k = c.k + b * c.k_at.b + h * c.k_at.h;
  const float* v = c.v + b * c.v_at.b + h * c.v_at.h;
  const int64_t keys = c.causal ? c.keys - c.queries + t + 1 : c.keys;
  for (int64_t s = 0; s < keys; ++s) {
    Floats sums = {};
    for (int64_t i = 0; i < c.depth; i += kWidth) {
      Floats x, y;
      std::memcpy(&x, q + i, sizeof x);
      std::memcpy(&y, k + s * c.k_at.t + i, sizeof y);
      sums += x * y;
    }
    scores[s] = Joined<kWidth>(sums, [](const auto& other, auto* x) { *x += other; });
  }
  const float scale = Exponentials<kWidth>(
      scores, c.bias + b * c.bias_at.b + h * c.bias_at.h + t * c.bias_at.t, MaskOf(c, b),
      keys, RoundUp(keys, kWidth));
  if (c.weights != nullptr) {
    float* to = c.weights + ((b * c.heads + h) * c.queries + t) * c.keys;
    for (int64_t s = 0; s < keys; ++s) to[s] = scores[s] * scale;
  }
  float* to = c.out + ((b * c.queries + t) * c.heads + h) * c.depth;
  int64_t i = 0;
  for (; i + 8 * kWidth <= c.depth; i += 8 * kWidth) {
    Tile<kWidth, 8, 1>(scores, 0, v + i, c.v_at.t, keys, to + i, 0);
  }
  for (; i < c.depth; i += kWidth) {
    Tile<kWidth, 1, 1>(scores, 0, v + i, c.v_at.t, keys, to + i, 0);
  }
  for (int64_t w = 0; w < c.depth; ++w) to[w] *= scale;
}

template <int kWidth>
ROUTECAST_INLINE void FewQueries(const AttentionCall& c, int64_t begin, int64_t end) {
  std::vector<float> scores(static_cast<size_t>(RoundUp(c.keys, kWidth)));
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t t = 0; t < c.queries; ++t) {
      OneQuery<kWidth>(c, i / c.heads, i % c.heads, t, scores.data());
    }
  }
}

constexpr int kFewWidth = 8;  // of vectors that few queries take on every machine
[[gnu::target("avx2,fma")]] void HeadsOfFew(const AttentionCall& c, int64_t begin,
                                            int64_t end) {
  FewQueries<kFewWidth>(c, begin, end);
}
// Panels as wide as registers allow; narrow heads take narrow ones.
[[gnu::target("avx512f")]] void Heads512(const AttentionCall& c, int64_t begin,
                                         int64_t end) {
  c.depth > 32 ? Heads<16, 4>(c, begin, end) : Heads<16, 1>(c, begin, end);
}
[[gnu::target("avx2,fma")]] void Heads256(const AttentionCall& c, int64_t begin,
                                          int64_t end) {
  c.depth > 8 ? Heads<8, 2>(c, begin, end) : Heads<8, 1>(c, begin, end);
}

AttentionLoop* LoopOfMachine() {
  static AttentionLoop* const loop =
      __builtin_cpu_supports("avx512f")                                 ? Heads512
      : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Heads256
                                                                        : nullptr;
  return loop;
}
}  // namespace

AttentionLoop* AttentionLoopFor(int64_t queries, int64_t depth) {
  AttentionLoop* const loop = LoopOfMachine();
  if (loop == nullptr || queries >= kLeastPacked) return loop;
  return depth % kFewWidth == 0 ? HeadsOfFew : nullptr;
}
#else

AttentionLoop* AttentionLoopFor(int64_t, int64_t) { return nullptr; }

#endif

}  // namespace routecast
