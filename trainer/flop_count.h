// What a model's matrix products cost, as LibTorch's operators see them.
#pragma once

#include <cstdint>
#include <functional>

namespace routecast {

// Floating-point operations (a multiply-add is two) of the matrix products, linear layers
// and attention products that `work` asks LibTorch for on this thread, nested calls
// included, each once. Own loops are no operators and do not count; sums, norms and
// activations, small beside them, neither. Thread rule: any, not nested.
uint64_t MatrixFlops(const std::function<void()>& work);

}  // namespace routecast
