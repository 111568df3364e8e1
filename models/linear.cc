#include "models/linear.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <type_traits>
#include <vector>

#include "models/onednn_linear.h"

namespace routecast {
namespace {

// Float32, more rows: a library's repacking of the weights pays (docs/results).
constexpr int64_t kFewRows = 96;
constexpr int64_t kFewBf16Rows = 4;     // bfloat16 where the machine has its instructions
constexpr int kRows = 3, kColumns = 4;  // 12 sums, 3 inputs and a weight: 16 registers
constexpr int64_t kDepth = 1024;        // a tile of 4 weight rows this deep stays in L1
constexpr int64_t kGrain = 1 << 17;     // products that are worth a thread
constexpr int64_t kPiece = 1 << 15;     // products that a thread takes at once

using Bf16 = uint16_t;  // the upper half of a float

#define ROUTECAST_INLINE [[gnu::always_inline]] inline

constexpr int kWidth = 8;
typedef float Floats __attribute__((vector_size(kWidth * sizeof(float))));
typedef float Four __attribute__((vector_size(4 * sizeof(float))));
typedef uint32_t Words __attribute__((vector_size(kWidth * sizeof(uint32_t))));
typedef Bf16 Halves __attribute__((vector_size(kWidth * sizeof(Bf16))));

ROUTECAST_INLINE void Load(const float* from, Floats* to) {
  std::memcpy(to, from, sizeof(Floats));
}
ROUTECAST_INLINE void Load(const Bf16* from, Floats* to) {
  Halves half;
  std::memcpy(&half, from, sizeof half);
  const Words wide = __builtin_convertvector(half, Words) << 16;
  std::memcpy(to, &wide, sizeof wide);
}
// Neighbours first, then the halves: the same order for one column and for four.
ROUTECAST_INLINE float Sum(const Floats& v) {
  return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}
// Sums of four columns at once.
ROUTECAST_INLINE Four SumFour(const Floats* v) {
  const Floats even01 = __builtin_shufflevector(v[0], v[1], 0, 2, 8, 10, 4, 6, 12, 14);
  const Floats odd01 = __builtin_shufflevector(v[0], v[1], 1, 3, 9, 11, 5, 7, 13, 15);
  const Floats even23 = __builtin_shufflevector(v[2], v[3], 0, 2, 8, 10, 4, 6, 12, 14);
  const Floats odd23 = __builtin_shufflevector(v[2], v[3], 1, 3, 9, 11, 5, 7, 13, 15);
  const Floats pairs01 = even01 + odd01, pairs23 = even23 + odd23;
  const Floats quads =
      __builtin_shufflevector(pairs01, pairs23, 0, 2, 8, 10, 4, 6, 12, 14) +
      __builtin_shufflevector(pairs01, pairs23, 1, 3, 9, 11, 5, 7, 13, 15);
  return __builtin_shufflevector(quads, quads, 0, 1, 2, 3) +
         __builtin_shufflevector(quads, quads, 4, 5, 6, 7);
}

ROUTECAST_INLINE float Value(float weight) { return weight; }
ROUTECAST_INLINE float Value(Bf16 weight) {
  return std::bit_cast<float>(static_cast<uint32_t>(weight) << 16);
}

ROUTECAST_INLINE void Widen(const Bf16* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    Floats wide;
    Load(from + i, &wide);
    std::memcpy(to + i, &wide, sizeof wide);
  }
  for (; i < count; ++i) to[i] = Value(from[i]);
}

// y[rows,columns] (+)= x[rows,depth] w[columns,depth]^T
template <int kR, int kC, bool kAhead, class Weight>
ROUTECAST_INLINE void Tile(const float* x, int64_t x_stride, const Weight* w,
                           int64_t w_stride, int64_t depth, bool add, float* y,
                           int64_t y_stride) {
  constexpr int64_t kLine = 64 / sizeof(Weight);
  Floats sums[kR][kC] = {};
  int64_t k = 0;
  for (; k + kWidth <= depth; k += kWidth) {
    Floats inputs[kR];
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) Load(x + r * x_stride + k, &inputs[r]);
#pragma GCC unroll 4
    for (int c = 0; c < kC; ++c) {
      // The next columns' weights: rows this short are over before the machine sees
      // that they are a stream. Into the second level: more lines may be on their way
      // to it than to the first.
      if (kAhead && k % kLine == 0) {
        __builtin_prefetch(w + (c + kC) * w_stride + k, /*write=*/0, /*locality=*/2);
      }
      Floats weight;
      Load(w + c * w_stride + k, &weight);
#pragma GCC unroll 4
      for (int r = 0; r < kR; ++r) sums[r][c] += inputs[r] * weight;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kR; ++r) {
    float sum[kC];
    if constexpr (kC == 4) {
      const Four four = SumFour(sums[r]);
      std::memcpy(sum, &four, sizeof sum);
    } else {
      sum[0] = Sum(sums[r][0]);
    }
    for (int c = 0; c < kC; ++c) {
      for (int64_t i = k; i < depth; ++i) {
        sum[c] += x[r * x_stride + i] * Value(w[c * w_stride + i]);
      }
      float& out = y[r * y_stride + c];
      out = add ? out + sum[c] : sum[c];
    }
  }
}

template <class Weight>
struct Product {
  const float* x;
  const Weight* w;
  float* y;
  int64_t rows, depth, columns;
};

template <int kC, class Weight>
ROUTECAST_INLINE void Rows(const Product<Weight>& p, const Weight* w, int64_t w_stride,
                           int64_t k, int64_t depth, float* y) {
  const float* x = p.x + k;
  const int64_t in = p.depth, out = p.columns;
  int64_t r = 0;
  if (p.rows >= kRows) {
    Tile<kRows, kC, true>(x, in, w, w_stride, depth, k > 0, y, out);
    r = kRows;
  } else {
    Tile<1, kC, true>(x, in, w, w_stride, depth, k > 0, y, out);
    r = 1;
  }
  for (; r + kRows <= p.rows; r += kRows) {
    Tile<kRows, kC, false>(x + r * in, in, w, w_stride, depth, k > 0, y + r * out, out);
  }
  for (; r < p.rows; ++r) {
    Tile<1, kC, false>(x + r * in, in, w, w_stride, depth, k > 0, y + r * out, out);
  }
}

template <int kC, class Weight>
ROUTECAST_INLINE void Columns(const Product<Weight>& p, int64_t column) {
  const Weight* w = p.w + column * p.depth;
  for (int64_t k = 0; k < p.depth; k += kDepth) {
    const int64_t depth = std::min(kDepth, p.depth - k);
    if constexpr (std::is_same_v<Weight, Bf16>) {
      if (p.rows > kRows) {  // widened once for all rows
        float wide[kC * kDepth];
        for (int c = 0; c < kC; ++c) Widen(w + c * p.depth + k, depth, wide + c * kDepth);
        const Product<float> q{p.x, nullptr, p.y, p.rows, p.depth, p.columns};
        Rows<kC>(q, wide, kDepth, k, depth, p.y + column);
        continue;
      }
    }
    Rows<kC>(p, w + k, p.depth, k, depth, p.y + column);
  }
}

template <class Weight>
ROUTECAST_INLINE void Range(const Product<Weight>& p, int64_t begin, int64_t end) {
  int64_t c = begin;
  for (; c + kColumns <= end; c += kColumns) Columns<kColumns>(p, c);
  for (; c < end; ++c) Columns<1>(p, c);
}

template <class Weight>
void RangePlain(const Product<Weight>& p, int64_t begin, int64_t end) {
  Range(p, begin, end);
}
#if defined(__x86_64__)
template <class Weight>
[[gnu::target("avx2,fma")]] void RangeWide(const Product<Weight>& p, int64_t begin,
                                           int64_t end) {
  Range(p, begin, end);
}
bool HasWide() {
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return has;
}
#else
template <class Weight>
void RangeWide(const Product<Weight>& p, int64_t begin, int64_t end) {
  Range(p, begin, end);
}
bool HasWide() { return false; }
#endif

// Whole tiles at a time: the split changes no sum. Threads take pieces as they come: one
// that the machine takes away for a while (a transfer on its core) keeps one piece
// waiting, not half of the product.
template <class Weight>
void Multiply(const Product<Weight>& p) {
  const int64_t tiles = (p.columns + kColumns - 1) / kColumns;
  const int64_t work = std::max<int64_t>(1, p.rows * p.depth * kColumns);
  const auto run = HasWide() ? RangeWide<Weight> : RangePlain<Weight>;
  const int64_t piece = std::max<int64_t>(1, kPiece / work);
  const int64_t pieces = (tiles + piece - 1) / piece;
  const int64_t threads = std::min<int64_t>(
      {at::get_num_threads(), pieces, (tiles * work + kGrain - 1) / kGrain});
  if (threads <= 1 || at::in_parallel_region()) {
    run(p, 0, p.columns);
    return;
  }
  std::atomic<int64_t> next = 0;
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < pieces; i = next++) {
      const int64_t from = i * piece * kColumns;
      run(p, from, std::min(from + piece * kColumns, p.columns));
    }
  });
}

// Instructions for bfloat16 that LibTorch's library makes use of.
bool HasBf16() {
#if defined(__x86_64__)
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has;
#else
  return true;
#endif
}

enum class Way { kLibrary, kOwnLoops, kOneDnn, kTrained };

Way WayOf(const at::Tensor& x, const at::Tensor& weight, int64_t rows) {
  if (!HasWide() || rows == 0 || !x.device().is_cpu() ||
      x.scalar_type() != weight.scalar_type() || !x.is_contiguous() ||
      !weight.is_contiguous()) {
    return Way::kLibrary;
  }
  if (c10::GradMode::is_enabled() && (x.requires_grad() || weight.requires_grad())) {
    return Way::kTrained;
  }
  if (x.scalar_type() == at::kBFloat16 && (!HasBf16() || rows <= kFewBf16Rows)) {
    return Way::kOwnLoops;
  }
  if (x.scalar_type() != at::kFloat) return Way::kLibrary;
  if (rows <= kFewRows) return Way::kOwnLoops;
  return PrefersOneDnn() ? Way::kOneDnn : Way::kLibrary;
}

}  // namespace

at::Tensor OwnLinear(const at::Tensor& x, const at::Tensor& weight) {
  const int64_t rows = x.size(0), depth = x.size(1), columns = weight.size(0);
  const at::Tensor input = x.to(at::kFloat);
  at::Tensor out = at::empty({rows, columns}, input.options());
  if (weight.scalar_type() == at::kFloat) {
    Multiply<float>({input.const_data_ptr<float>(), weight.const_data_ptr<float>(),
                     out.mutable_data_ptr<float>(), rows, depth, columns});
  } else {
    Multiply<Bf16>({input.const_data_ptr<float>(),
                    static_cast<const Bf16*>(weight.const_data_ptr()),
                    out.mutable_data_ptr<float>(), rows, depth, columns});
  }
  return out.to(x.scalar_type());
}

namespace {

at::Tensor LinearOf(const at::Tensor& x, const at::Tensor& weight, bool relu) {
  const int64_t width = x.size(-1), rows = width > 0 ? x.numel() / width : 0;
  const Way way = WayOf(x, weight, rows);
  if (way == Way::kTrained || way == Way::kLibrary) {
    const at::Tensor y =
        way == Way::kTrained ? TrainedLinear(x, weight) : at::linear(x, weight);
    return relu ? at::relu(y) : y;
  }
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = weight.size(0);
  const at::Tensor flat = x.view({rows, width});
  if (way == Way::kOneDnn) return OneDnnLinear(flat, weight, relu).view(shape);
  const at::Tensor y = OwnLinear(flat, weight).view(shape);
  return relu ? y.relu_() : y;
}

}  // namespace

at::Tensor Linear(const at::Tensor& x, const at::Tensor& weight) {
  return LinearOf(x, weight, /*relu=*/false);
}

at::Tensor LinearRelu(const at::Tensor& x, const at::Tensor& weight) {
  return LinearOf(x, weight, /*relu=*/true);
}

}  // namespace routecast
