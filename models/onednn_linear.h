// oneDNN's float32 product, which LibTorch brings but does not take for plain float32
// products. On AMD's machines the other library (MKL) leaves a fifth to a third of the
// arithmetic unused (docs/results, bench/linear_bench).
#pragma once

#include <ATen/core/Tensor.h>

namespace routecast {

// Whether this machine has it and it is the faster one for large products. One answer for
// the life of the process: results of a machine do not change between runs.
bool PrefersOneDnn();

// x [N,D] weight [F,D]^T -> [N,F], new. REQUIRES CPU, float32, no gradient wanted;
// `weight` may be a transposed view. Any thread. Equal for equal shapes and threads.
at::Tensor OneDnnLinear(const at::Tensor& x_ND, const at::Tensor& weight_FD);

// How many of `rows` rows should go to it at once; 0: too few. It makes code for each
// shape that it meets (about a millisecond) and keeps 1,024 of them, and experts have any
// number of rows: so they come in 23 sizes.
int64_t OneDnnRows(int64_t rows);

// x [...,D] weight [F,D]^T + bias [F] -> [...,F] with gradients: the product and x's
// gradient by oneDNN, the weight's by at::mm, which is as fast there. For any x, any
// thread; is at::linear where that is the better way (few rows, other dtypes and devices,
// autocast). `bias` may be undefined. Has no second derivative.
at::Tensor TrainedLinear(const at::Tensor& x, const at::Tensor& weight,
                         const at::Tensor& bias = {});

}  // namespace routecast
