// Dense layers over a few rows, without the cost of tensor calls (several microseconds
// each): what prediction between two layers of a pass can afford. Float32, row-major.
#pragma once

namespace routecast {

// y[rows,out] = x[rows,in] weight[out,in]^T + bias[out]
void DenseRows(const float* x, int rows, int in, const float* weight, const float* bias,
               int out, float* y);
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
