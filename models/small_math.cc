#include "models/small_math.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/wide_loops.h"

namespace routecast {
namespace {

constexpr int kLanes = 32;  // DenseRows adds them in pairs

// Partial sums in lanes, so that the compiler may use vectors without reordering a sum.
template <class Weight>
[[gnu::always_inline]] inline float RowSum(const Weight* w, const float* v, int in) {
  float lanes[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= in; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) lanes[k] += static_cast<float>(w[i + k]) * v[i + k];
  }
  float sum = 0;
  for (; i < in; ++i) sum += static_cast<float>(w[i]) * v[i];
  // In pairs: one after the other, the additions would wait for each other longer than
  // the products take.
  for (int k = 0; k < 16; ++k) lanes[k] += lanes[k + 16];
  for (int k = 0; k < 8; ++k) lanes[k] += lanes[k + 8];
  for (int k = 0; k < 4; ++k) lanes[k] += lanes[k + 4];
  return sum + ((lanes[0] + lanes[2]) + (lanes[1] + lanes[3]));
}

}  // namespace

ROUTECAST_WIDE void DenseRows(const float* x, int rows, int in, const float* weight,
                              const float* bias, int out, float* y) {
  for (int o = 0; o < out; ++o) {
    const float* w = weight + static_cast<long>(o) * in;
    for (int r = 0; r < rows; ++r) {
      y[static_cast<long>(r) * out + o] =
          bias[o] + RowSum(w, x + static_cast<long>(r) * in, in);
    }
  }
}

NarrowMatrix::NarrowMatrix(const float* from, int64_t out, int depth)
    : in(depth),
      weight(static_cast<size_t>(out) * static_cast<size_t>(depth)),
      scale(static_cast<size_t>(out)) {
  for (int64_t o = 0; o < out; ++o) {
    const float* row = from + o * depth;
    float largest = 0;
    for (int i = 0; i < depth; ++i) largest = std::max(largest, std::abs(row[i]));
    const float unit = largest > 0 ? largest / 127 : 1;
    scale[static_cast<size_t>(o)] = unit;
    int8_t* to = weight.data() + o * depth;
    for (int i = 0; i < depth; ++i) {
      to[i] = static_cast<int8_t>(std::lround(row[i] / unit));
    }
  }
}

ROUTECAST_WIDE void DenseRows(const float* x, int rows, const NarrowMatrix& matrix,
                              int64_t first, const float* bias, int out, float* y) {
  const int in = matrix.in;
  const int8_t* weight = matrix.weight.data() + first * in;
  const float* scale = matrix.scale.data() + first;
  for (int o = 0; o < out; ++o) {
    const int8_t* w = weight + static_cast<long>(o) * in;
    for (int r = 0; r < rows; ++r) {
      y[static_cast<long>(r) * out + o] =
          bias[o] + scale[o] * RowSum(w, x + static_cast<long>(r) * in, in);
    }
  }
}

ROUTECAST_WIDE void AttendOne(const float* query, int width, int heads,
                              const float* keys_WS, const float* values_SW,
                              const float* bias_S, int source, float* weight_S,
                              float* mixed_W) {
  const int wide = width / heads;
  const float scale = 1 / std::sqrt(static_cast<float>(wide));
  for (int i = 0; i < width; ++i) mixed_W[i] = 0;
  for (int from = 0; from < width; from += wide) {
    for (int s = 0; s < source; ++s) weight_S[s] = bias_S[s];
    for (int i = from; i < from + wide; ++i) {
      const float q = query[i] * scale;
      const float* keys = keys_WS + static_cast<long>(i) * source;
      for (int s = 0; s < source; ++s) weight_S[s] += q * keys[s];
    }
    float best = -std::numeric_limits<float>::infinity(), total = 0;
    for (int s = 0; s < source; ++s) best = std::max(best, weight_S[s]);
    for (int s = 0; s < source; ++s) {
      weight_S[s] = std::exp(weight_S[s] - best);
      total += weight_S[s];
    }
    for (int s = 0; s < source; ++s) {
      const float w = weight_S[s] / total;
      const float* values = values_SW + static_cast<long>(s) * width;
      for (int i = from; i < from + wide; ++i) mixed_W[i] += w * values[i];
    }
  }
}

void NormRows(const float* x, int rows, int width, const float* gain, const float* bias,
              float* y) {
  for (int r = 0; r < rows; ++r, x += width, y += width) {
    double sum = 0, square = 0;
    for (int i = 0; i < width; ++i) sum += x[i];
    const double mean = sum / width;
    for (int i = 0; i < width; ++i) square += (x[i] - mean) * (x[i] - mean);
    const double scale = 1 / std::sqrt(square / width + 1e-5);
    for (int i = 0; i < width; ++i) {
      y[i] = static_cast<float>((x[i] - mean) * scale) * gain[i] + bias[i];
    }
  }
}

void GeluValues(float* x, int count) {
  for (int i = 0; i < count; ++i) {
    x[i] = 0.5f * x[i] * (1 + std::erf(x[i] * 0.70710678f));
  }
}

void AddValues(const float* x, int count, float* y) {
  for (int i = 0; i < count; ++i) y[i] += x[i];
}

}  // namespace routecast
