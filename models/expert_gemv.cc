#include "models/expert_gemv.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include <stdexcept>

#include "models/expert_gemv_body.h"

namespace routecast {
namespace {

int TypeIndex(at::ScalarType type) {
  if (type == at::kFloat) return 0;
  if (type == at::kBFloat16) return 1;
  if (type == at::kHalf) return 2;
  throw std::logic_error("expert gemv: the type is none of fp32, bf16, fp16");
}

int64_t AddressOf(const at::Tensor& weight, const ExpertWeights& first) {
  if (!weight.defined()) return 0;
  if (!weight.is_contiguous() || weight.device() != first.wi_FD.device() ||
      weight.scalar_type() != first.wi_FD.scalar_type()) {
    throw std::logic_error("TableOf: weights that are not alike");
  }
  const auto address =
      static_cast<int64_t>(reinterpret_cast<intptr_t>(weight.const_data_ptr()));
  if (address % 16 != 0) throw std::logic_error("TableOf: weights between 16-byte words");
  return address;
}

// x of `depth` numbers a row times matrix `which` of each token's expert.
at::Tensor Product(const ExpertTable& table, const at::Tensor& x, const at::Tensor& ids,
                   int which, int64_t columns, Activation activation) {
  const at::Tensor out = at::empty({x.size(0), columns}, x.options());
  const auto row_bytes =
      static_cast<uintptr_t>(x.size(1)) * static_cast<uintptr_t>(x.element_size());
  // Weights come from allocators, or from slots of whole pages: only rows can be odd.
  const bool wide =
      (row_bytes | reinterpret_cast<uintptr_t>(x.const_data_ptr())) % 16 == 0;
  const GemvArgs args{table.addresses_E3.const_data_ptr<int64_t>(),
                      ids.const_data_ptr<int64_t>(),
                      x.const_data_ptr(),
                      out.mutable_data_ptr(),
                      x.size(0),
                      x.size(1),
                      columns,
                      which,
                      table.gated,
                      activation,
                      wide};
  (x.is_cuda() ? GemvCuda : GemvCpu)(args, TypeIndex(x.scalar_type()));
  return out;
}

}  // namespace

ExpertTable TableOf(std::span<const ExpertWeights> layer) {
  const ExpertWeights& first = layer.front();
  ExpertTable table;
  table.dtype = first.wi_FD.scalar_type();
  table.d_ff = first.wi_FD.size(0);
  table.d_model = first.wi_FD.size(1);
  table.gated = first.gate_FD.defined();
  const at::Tensor addresses =
      at::empty({static_cast<int64_t>(layer.size()), 3}, at::kLong);
  int64_t* to = addresses.mutable_data_ptr<int64_t>();
  for (const ExpertWeights& expert : layer) {
    for (const at::Tensor* t : {&expert.wi_FD, &expert.wo_DF, &expert.gate_FD}) {
      *to++ = AddressOf(*t, first);
    }
  }
  table.addresses_E3 = addresses.to(first.wi_FD.device());
  return table;
}

at::Tensor ExpertGemv(Activation activation, const ExpertTable& table,
                      const at::Tensor& x_ND, const at::Tensor& expert_ids_N) {
  if (x_ND.scalar_type() != table.dtype || x_ND.size(1) != table.d_model ||
      x_ND.device() != table.addresses_E3.device()) {
    throw std::logic_error("ExpertGemv: tokens and experts are not alike");
  }
  const c10::DeviceGuard guard(x_ND.device());
  const at::Tensor ids = expert_ids_N.contiguous();
  const at::Tensor inner =
      Product(table, x_ND.contiguous(), ids, 0, table.d_ff, activation);
  return Product(table, inner, ids, 1, table.d_model, activation);
}

}  // namespace routecast
