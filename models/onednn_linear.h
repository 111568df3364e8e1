// oneDNN's float32 product, which LibTorch brings but does not take for plain float32
// products. On AMD's machines the other library (MKL) leaves a fifth to a third of the
// arithmetic unused (docs/results, bench/linear_bench).
#pragma once

#include <ATen/core/Tensor.h>

namespace routecast {

// Whether this machine has it and it is the faster one for large products. One answer for
// the life of the process: results of a machine do not change between runs.
bool PrefersOneDnn();

// x [N,D] weight [F,D]^T -> [N,F], new, contiguous; `relu`: what is below zero becomes
// zero. REQUIRES N > 0, CPU, float32, no gradient wanted; `weight` may be a transposed
// view. Any thread. Equal for equal shapes and threads.
at::Tensor OneDnnLinear(const at::Tensor& x_ND, const at::Tensor& weight_FD,
                        bool relu = false);

// How many rows it is asked for at once where there are `rows` (> 0): more, filled up
// with zeros, or fewer of many. oneDNN makes code for each number that it meets (about a
// millisecond and a MiB) and keeps 1,024 of them, and experts have any number of rows: so
// they come in 35 sizes.
int64_t OneDnnRows(int64_t rows);

// x [...,D] weight [F,D]^T + bias [F] -> [...,F] with gradients: the product and x's
// gradient by oneDNN, the weight's by the library, which is as fast there. Members side
// by side: x [M,N,D], weight [M,F,D], bias [M,F] -> [M,N,F]. For any x, any thread; is
// the library's product where that is the better way (few rows, other dtypes and devices,
// autocast). `bias` may be undefined. Has no second derivative.
at::Tensor TrainedLinear(const at::Tensor& x, const at::Tensor& weight,
                         const at::Tensor& bias = {});

}  // namespace routecast
