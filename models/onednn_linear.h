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

// out [N,F] = the same product for any number of rows, in those sizes. `few` (x, weight,
// out) writes what is left over.
using FewRowsProduct = void(const at::Tensor&, const at::Tensor&, at::Tensor);
void OneDnnLinearInBlocks(const at::Tensor& x_ND, const at::Tensor& weight_FD,
                          FewRowsProduct* few, at::Tensor out_NF);

// x [...,D] weight [F,D]^T + bias [F] -> [...,F] with gradients: the product and x's
// gradient by oneDNN, the weight's by the library, which is as fast there. Members side
// by side: x [M,N,D], weight [M,F,D], bias [M,F] -> [M,N,F]. For any x, any thread; is
// the library's product where that is the better way (few rows, other dtypes and devices,
// autocast). `bias` may be undefined. Has no second derivative.
at::Tensor TrainedLinear(const at::Tensor& x, const at::Tensor& weight,
                         const at::Tensor& bias = {});

}  // namespace routecast
