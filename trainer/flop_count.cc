#include "trainer/flop_count.h"

#include <ATen/ATen.h>
#include <ATen/record_function.h>

#include <stdexcept>
#include <string_view>

namespace routecast {
namespace {

thread_local uint64_t* counted = nullptr;

uint64_t Product(const at::Tensor& a, const at::Tensor& b) {
  // [.., N,K] times what has K rows, or [K]: each number of `a` meets the rest of `b`.
  const int64_t depth = a.size(-1);
  if (depth == 0 || a.numel() == 0) return 0;
  const int64_t batch = b.dim() == 3 ? b.size(0) : 1;
  return 2 * static_cast<uint64_t>(a.numel()) *
         static_cast<uint64_t>(b.numel() / batch / depth);
}

uint64_t FlopsOf(std::string_view name, c10::ArrayRef<const c10::IValue> in) {
  const auto product = [&](size_t a, size_t b) {
    return Product(in.at(a).toTensor(), in.at(b).toTensor());
  };
  if (name == "aten::mm" || name == "aten::bmm" || name == "aten::mv" ||
      name == "aten::dot" || name == "mkldnn::_linear_pointwise") {
    return product(0, 1);
  }
  if (name == "aten::addmm" || name == "aten::baddbmm" || name == "aten::addmv") {
    return product(1, 2);
  }
  if (name == "aten::_scaled_dot_product_flash_attention_for_cpu") {
    const at::Tensor q = in.at(0).toTensor(), k = in.at(1).toTensor();
    return 4 * static_cast<uint64_t>(q.numel()) * static_cast<uint64_t>(k.size(-2));
  }
  return 0;
}

std::unique_ptr<at::ObserverContext> Count(const at::RecordFunction& call) {
  if (counted != nullptr) *counted += FlopsOf(call.name(), call.inputs());
  return nullptr;
}

}  // namespace

uint64_t MatrixFlops(const std::function<void()>& work) {
  if (counted != nullptr) throw std::logic_error("MatrixFlops inside MatrixFlops");
  struct Counting {
    uint64_t flops = 0;
    at::CallbackHandle handle = at::addThreadLocalCallback(
        at::RecordFunctionCallback(Count).needsInputs(true).scopes(
            {at::RecordScope::FUNCTION}));
    Counting() { counted = &flops; }
    ~Counting() {
      counted = nullptr;
      at::removeCallback(handle);
    }
  } counting;
  work();
  return counting.flops;
}

}  // namespace routecast
