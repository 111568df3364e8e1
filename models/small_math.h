// Dense layers over a few rows, without the cost of tensor calls (several microseconds
// each): what prediction between two layers of a pass can afford. Float32, row-major.
#pragma once

#include <cstdint>
#include <vector>

namespace routecast {

// y[rows,out] = x[rows,in] weight[out,in]^T + bias[out]
void DenseRows(const float* x, int rows, int in, const float* weight, const float* bias,
               int out, float* y);
// A matrix in a quarter of the bytes: each row's weights as whole multiples of the row's
// own scale, rounded to nearest: off by half a scale at most, 0.4 % of the row's largest.
// For products whose weights come from far memory.
struct NarrowMatrix {
  NarrowMatrix(const float* weight, int64_t out, int in);
  int in;
  std::vector<int8_t> weight;  // [out,in]
  std::vector<float> scale;    // [out]
};
// DenseRows of the rows [first, first + out) of `matrix`; bias and y begin there.
void DenseRows(const float* x, int rows, const NarrowMatrix& matrix, int64_t first,
               const float* bias, int out, float* y);
// Multi-head attention of one query over `source` rows: mixed[width] = softmax(query keys
// / sqrt(width / heads) + bias) values, head by head. Keys are transposed, so that the
// scores of many rows are added up side by side. `weight` is room for `source` numbers.
void AttendOne(const float* query, int width, int heads, const float* keys_WS,
               const float* values_SW, const float* bias_S, int source, float* weight_S,
               float* mixed_W);
// Layer norm with epsilon 1e-5; x and y may be the same.
void NormRows(const float* x, int rows, int width, const float* gain, const float* bias,
              float* y);
void GeluValues(float* x, int count);                 // exact, in place
void AddValues(const float* x, int count, float* y);  // y += x

}  // namespace routecast
