#include "models/token_groups.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/GradMode.h>

#include <stdexcept>

#include "models/token_groups_body.h"

namespace routecast {
namespace {

int TypeIndex(at::ScalarType type) {
  if (type == at::kFloat) return 0;
  if (type == at::kBFloat16) return 1;
  if (type == at::kHalf) return 2;
  throw std::logic_error("token groups: the type is none of fp32, bf16, fp16");
}

bool NeedsGradient(std::initializer_list<at::Tensor> tensors) {
  if (!c10::GradMode::is_enabled()) return false;
  for (const at::Tensor& t : tensors) {
    if (t.requires_grad()) return true;
  }
  return false;
}

// The largest word in which rows can be copied.
int WordBytes(const at::Tensor& x, const at::Tensor& out, int64_t row_bytes) {
  const auto address = reinterpret_cast<uintptr_t>(x.const_data_ptr()) |
                       reinterpret_cast<uintptr_t>(out.const_data_ptr()) |
                       static_cast<uintptr_t>(row_bytes);
  return address % 16 == 0 ? 16 : static_cast<int>(x.element_size());
}

// By the library, step by step: each has its gradient.
at::Tensor DifferentiableScatter(const at::Tensor& residual_ND, const at::Tensor& outputs,
                                 const at::Tensor& gates_N, const TokenGroups& groups) {
  const at::Tensor kept = groups.place_N.ge(0).nonzero().squeeze(1);
  if (kept.size(0) == residual_ND.size(0)) {
    const at::Tensor scaled =
        outputs.index_select(0, groups.place_N) * gates_N.unsqueeze(1);
    return residual_ND + scaled.to(residual_ND.scalar_type());
  }
  const at::Tensor rows = groups.place_N.index_select(0, kept);
  const at::Tensor scaled =
      outputs.index_select(0, rows) * gates_N.index_select(0, kept).unsqueeze(1);
  return residual_ND + at::zeros_like(residual_ND)
                           .index_copy(0, kept, scaled.to(residual_ND.scalar_type()));
}

}  // namespace

TokenGroups GroupByExpert(const at::Tensor& expert_ids_N, const at::Tensor& dropped_N,
                          int64_t num_experts) {
  const c10::DeviceGuard guard(expert_ids_N.device());
  const at::Tensor ids = expert_ids_N.contiguous();
  const at::Tensor dropped = dropped_N.defined() ? dropped_N.contiguous() : at::Tensor();
  const auto ints = ids.options().dtype(at::kInt);
  TokenGroups groups{at::empty_like(ids, ints), at::empty_like(ids, ints),
                     at::empty({num_experts + 1}, ids.options())};
  SortArgs args{ids.const_data_ptr<int64_t>(),
                dropped.defined() ? dropped.const_data_ptr<bool>() : nullptr,
                ids.numel(),
                num_experts,
                nullptr,
                groups.order_N.mutable_data_ptr<int>(),
                groups.place_N.mutable_data_ptr<int>(),
                groups.offsets_E1.mutable_data_ptr<int64_t>()};
  const at::Tensor counts = at::zeros({args.tiles(), args.keys()}, ints);
  args.counts = counts.mutable_data_ptr<int>();
  (ids.is_cuda() ? SortCuda : SortCpu)(args);
  return groups;
}

at::Tensor GatherRows(const at::Tensor& x_ND, const TokenGroups& groups) {
  if (NeedsGradient({x_ND})) return x_ND.index_select(0, groups.order_N);
  const c10::DeviceGuard guard(x_ND.device());
  const at::Tensor x = x_ND.contiguous(), out = at::empty_like(x);
  const int64_t row_bytes = x.size(1) * static_cast<int64_t>(x.element_size());
  GatherArgs args{x.const_data_ptr(), out.mutable_data_ptr(),
                  groups.order_N.const_data_ptr<int>(), x.size(0), row_bytes};
  if (!x.is_cuda()) {
    GatherCpu(args);
    return out;
  }
  const int word_bytes = WordBytes(x, out, row_bytes);
  args.words = row_bytes / word_bytes;
  GatherCuda(args, word_bytes);
  return out;
}

at::Tensor AddScattered(const at::Tensor& residual_ND, const at::Tensor& outputs,
                        const at::Tensor& gates_N, const TokenGroups& groups) {
  if (NeedsGradient({residual_ND, outputs, gates_N})) {
    return DifferentiableScatter(residual_ND, outputs, gates_N, groups);
  }
  const c10::DeviceGuard guard(residual_ND.device());
  const at::Tensor residual = residual_ND.contiguous(),
                   rows = outputs.to(residual.scalar_type()).contiguous(),
                   gates = gates_N.to(at::kFloat).contiguous(),
                   out = at::empty_like(residual);
  const ScatterArgs args{residual.const_data_ptr(),
                         rows.const_data_ptr(),
                         gates.const_data_ptr<float>(),
                         groups.place_N.const_data_ptr<int>(),
                         out.mutable_data_ptr(),
                         residual.size(0),
                         residual.size(1)};
  (residual.is_cuda() ? ScatterCuda : ScatterCpu)(args,
                                                  TypeIndex(residual.scalar_type()));
  return out;
}

}  // namespace routecast
