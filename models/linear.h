// The engine's matrix product: what LibTorch has, and own loops where that leaves much of
// the machine unused on CPUs: few rows with large float32 weights (a library repacks the
// weights first, which costs as much as the product when a dozen rows share them), and
// bfloat16 on machines without such instructions. Many float32 rows take oneDNN where it
// is the faster library (onednn_linear.h).
#pragma once

#include <ATen/core/Tensor.h>

namespace routecast {

// x [...,D] weight [F,D]^T -> [...,F]; sums in float32 where x is bfloat16, rounded to
// x's dtype. Any thread. Gradients flow. Equal for equal numbers of rows and threads.
at::Tensor Linear(const at::Tensor& x, const at::Tensor& weight);

// relu of it; the same bits as at::relu(Linear(x, weight)), in less time.
at::Tensor LinearRelu(const at::Tensor& x, const at::Tensor& weight);

// The own loops, for tests: REQUIRES CPU, contiguous, float32 or bfloat16 of one kind, no
// gradient, x [N,D]. A row's result is a function of the row and the weight alone.
at::Tensor OwnLinear(const at::Tensor& x_ND, const at::Tensor& weight_FD);

}  // namespace routecast
