#include "models/onednn_linear.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <optional>
#include <string_view>

namespace routecast {
namespace {

using Pointwise = at::Tensor(const at::Tensor&, const at::Tensor&,
                             const std::optional<at::Tensor>&, std::string_view,
                             c10::List<std::optional<at::Scalar>>,
                             std::optional<std::string_view>);

// Null where LibTorch was built without oneDNN.
const c10::TypedOperatorHandle<Pointwise>* Product() {
  static const auto product = []() -> std::optional<c10::TypedOperatorHandle<Pointwise>> {
    const auto found =
        c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
    if (!found) return std::nullopt;
    return found->typed<Pointwise>();
  }();
  return product ? &*product : nullptr;
}

constexpr int64_t kLong = 1024, kMost = 8192;

at::Tensor Multiply(const at::Tensor& x, const at::Tensor& weight, bool relu) {
  return Product()->call(x, weight, std::nullopt, relu ? "relu" : "none",
                         c10::List<std::optional<at::Scalar>>(), "");
}

}  // namespace

int64_t OneDnnRows(int64_t rows) {
  if (rows > kLong) return std::min(rows / kLong * kLong, kMost);
  const int64_t step = rows <= 256 ? 16 : 64;
  return (rows + step - 1) / step * step;
}

bool PrefersOneDnn() {
#if defined(__x86_64__)
  static const bool prefers = __builtin_cpu_is("amd") &&
                              __builtin_cpu_supports("avx512f") && at::hasMKLDNN() &&
                              Product() != nullptr;
  return prefers;
#else
  return false;
#endif
}

at::Tensor OneDnnLinear(const at::Tensor& x_ND, const at::Tensor& weight_FD, bool relu) {
  const int64_t rows = x_ND.size(0), size = OneDnnRows(rows);
  if (size == rows) return Multiply(x_ND, weight_FD, relu);
  if (size > rows) {
    const at::Tensor wide = at::empty({size, x_ND.size(1)}, x_ND.options());
    wide.narrow(0, 0, rows).copy_(x_ND);
    wide.narrow(0, rows, size - rows).zero_();
    return Multiply(wide, weight_FD, relu).narrow(0, 0, rows);
  }
  const at::Tensor out = at::empty({rows, weight_FD.size(0)}, x_ND.options());
  for (int64_t row = 0; row < rows;) {
    const int64_t block = std::min(OneDnnRows(rows - row), rows - row);
    out.narrow(0, row, block)
        .copy_(OneDnnLinear(x_ND.narrow(0, row, block), weight_FD, relu));
    row += block;
  }
  return out;
}

}  // namespace routecast
