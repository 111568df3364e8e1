#include "models/expert_gemv.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
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

// [rows,columns] of the table's kind.
int64_t AddressOf(const at::Tensor& weight, int64_t rows, int64_t columns,
                  const ExpertTable& table) {
  if (!weight.is_contiguous() || weight.device() != table.addresses_E3.device() ||
      weight.scalar_type() != table.dtype || weight.size(0) != rows ||
      weight.size(1) != columns) {
    throw std::logic_error("expert table: weights that are not alike");
  }
  const auto address = reinterpret_cast<uintptr_t>(weight.const_data_ptr());
  const auto row_bytes =
      static_cast<uintptr_t>(columns) * static_cast<uintptr_t>(weight.element_size());
  // Rows of whole words are read by the word.
  if (address % 16 != 0 && row_bytes % 16 == 0) {
    throw std::logic_error("expert table: weights between 16-byte words");
  }
  return static_cast<int64_t>(address);
}

// x of `depth` numbers a row times matrix `which` of each token's expert, into `out`.
void Product(const ExpertTable& table, const at::Tensor& x, const at::Tensor& ids,
             int which, Activation activation, const at::Tensor& out) {
  const auto row_bytes =
      static_cast<uintptr_t>(x.size(1)) * static_cast<uintptr_t>(x.element_size());
  // Weights of such rows begin at a word (AddressesOf).
  const bool wide =
      (row_bytes | reinterpret_cast<uintptr_t>(x.const_data_ptr())) % 16 == 0;
  const GemvArgs args{table.addresses_E3.const_data_ptr<int64_t>(),
                      ids.const_data_ptr<int64_t>(),
                      x.const_data_ptr(),
                      out.mutable_data_ptr(),
                      x.size(0),
                      x.size(1),
                      out.size(1),
                      which,
                      table.gated,
                      activation,
                      wide};
  (x.is_cuda() ? GemvCuda : GemvCpu)(args, TypeIndex(x.scalar_type()));
}

}  // namespace

std::array<int64_t, 3> AddressesOf(const ExpertWeights& expert,
                                   const ExpertTable& table) {
  if (table.gated != expert.gate_FD.defined())
    throw std::logic_error("expert table: weights that are not alike");
  const int64_t f = table.d_ff, d = table.d_model;
  return {AddressOf(expert.wi_FD, f, d, table), AddressOf(expert.wo_DF, d, f, table),
          table.gated ? AddressOf(expert.gate_FD, f, d, table) : 0};
}

ExpertTable TableOf(std::span<const ExpertWeights> layer) {
  const ExpertWeights& first = layer.front();
  ExpertTable table;
  table.dtype = first.wi_FD.scalar_type();
  table.d_ff = first.wi_FD.size(0);
  table.d_model = first.wi_FD.size(1);
  table.gated = first.gate_FD.defined();
  const at::Tensor addresses =
      at::empty({static_cast<int64_t>(layer.size()), 3}, at::kLong);
  table.addresses_E3 = at::empty_like(addresses, first.wi_FD.device());
  int64_t* to = addresses.mutable_data_ptr<int64_t>();
  for (const ExpertWeights& expert : layer)
    to = std::ranges::copy(AddressesOf(expert, table), to).out;
  table.addresses_E3.copy_(addresses);
  return table;
}

void ExpertGemvInto(Activation activation, const ExpertTable& table,
                    const at::Tensor& x_ND, const at::Tensor& expert_ids_N,
                    const at::Tensor& out_ND) {
  if (x_ND.scalar_type() != table.dtype || x_ND.size(1) != table.d_model ||
      x_ND.device() != table.addresses_E3.device() || !out_ND.is_contiguous() ||
      out_ND.sizes() != x_ND.sizes() || out_ND.scalar_type() != table.dtype) {
    throw std::logic_error("ExpertGemv: tokens and experts are not alike");
  }
  const c10::DeviceGuard guard(x_ND.device());
  const at::Tensor x = x_ND.contiguous(), ids = expert_ids_N.contiguous();
  const at::Tensor inner = at::empty({x.size(0), table.d_ff}, x.options());
  Product(table, x, ids, 0, activation, inner);
  Product(table, inner, ids, 1, activation, out_ND);
}

at::Tensor ExpertGemv(Activation activation, const ExpertTable& table,
                      const at::Tensor& x_ND, const at::Tensor& expert_ids_N) {
  const at::Tensor out =
      at::empty_like(x_ND, x_ND.options(), at::MemoryFormat::Contiguous);
  ExpertGemvInto(activation, table, x_ND, expert_ids_N, out);
  return out;
}

}  // namespace routecast
