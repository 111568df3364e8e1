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

constexpr int64_t kStep = 64, kLongStep = 1024, kMost = 8192;

}  // namespace

int64_t OneDnnRows(int64_t rows) {
  if (rows < kLongStep) return rows / kStep * kStep;
  return std::min(rows / kLongStep * kLongStep, kMost);
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

at::Tensor OneDnnLinear(const at::Tensor& x_ND, const at::Tensor& weight_FD) {
  return Product()->call(x_ND, weight_FD, std::nullopt, "none",
                         c10::List<std::optional<at::Scalar>>(), "");
}

void OneDnnLinearInBlocks(const at::Tensor& x_ND, const at::Tensor& weight_FD,
                          FewRowsProduct* few, at::Tensor out_NF) {
  const int64_t rows = x_ND.size(0);
  int64_t row = 0;
  while (const int64_t block = OneDnnRows(rows - row)) {
    out_NF.narrow(0, row, block)
        .copy_(OneDnnLinear(x_ND.narrow(0, row, block), weight_FD));
    row += block;
  }
  const int64_t rest = rows - row;
  if (rest > 0) few(x_ND.narrow(0, row, rest), weight_FD, out_NF.narrow(0, row, rest));
}

}  // namespace routecast
