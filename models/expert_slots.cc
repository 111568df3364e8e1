#include "models/expert_slots.h"

#include <ATen/ATen.h>

#include <cmath>
#include <stdexcept>

namespace routecast {
namespace {

// The newest `context` of the first `known` columns, right-aligned, padded with the
// unknown id on the left.
at::Tensor LastLayers(const at::Tensor& ids_BTL, int64_t known, int64_t context,
                      int64_t unknown) {
  const auto padding =
      at::full({ids_BTL.size(0), ids_BTL.size(1), context}, unknown, ids_BTL.options());
  return at::cat({padding, ids_BTL.narrow(2, 0, known)}, 2).narrow(2, known, context);
}

// Row t holds what ids_BTL has of token t - 1.
at::Tensor OfTokenBefore(const at::Tensor& ids_BTL, const at::Tensor& before_BL,
                         int64_t unknown) {
  const auto first = before_BL.defined()
                         ? before_BL.unsqueeze(1)
                         : at::full_like(ids_BTL.narrow(1, 0, 1), unknown);
  return at::cat({first, ids_BTL.narrow(1, 0, ids_BTL.size(1) - 1)}, 1);
}

at::Tensor Repeat(const at::Tensor& x, int64_t members) {
  if (!x.defined()) return x;
  std::vector<int64_t> times(static_cast<size_t>(x.dim()), 1);
  times[0] = members;
  return x.repeat(times);
}

// Additive mask [B,1,1 or T*R,T*R] of T tokens of R rows; `past` as in SlotMask.
at::Tensor RowMask(const at::Tensor& valid_BTR, Stack stack, TokenMemory* past) {
  const int64_t R = valid_BTR.size(2);
  const auto valid = WithKnown(valid_BTR.flatten(1, 2), 1, past);
  auto may = valid.view({valid.size(0), 1, 1, valid.size(1)});
  if (stack == Stack::kDecoder) {
    const auto token =
        at::arange(valid.size(1), valid.options().dtype(at::kLong)).floor_divide(R);
    const auto asking = token.slice(0, KnownTokens(past) * R);
    may = may.logical_and(token.unsqueeze(0).le(asking.unsqueeze(1)));
  }
  return AdditiveMask(may);
}

}  // namespace

at::Tensor SlotRows(const at::Tensor& ids_BTL, const RoutingWindow& window, int context,
                    int64_t padding, const at::Tensor& before_BL) {
  const auto own = LastLayers(ids_BTL, window.source_layer + 1, context, padding);
  if (window.stack == Stack::kEncoder) return own;
  const auto before = OfTokenBefore(ids_BTL, before_BL, padding);
  return at::cat({LastLayers(before, before.size(2), context, padding), own}, 2);
}

ExpertSlots SlotsOf(const RoutingWindow& window, int context) {
  ExpertSlots slots;
  slots.ids_BTR =
      SlotRows(window.experts_BTL, window, context, window.num_experts, window.before_BL);
  auto valid = slots.ids_BTR.ne(window.num_experts);
  // The newest slot always counts: before the first layer its padding id says just that.
  valid.select(2, valid.size(2) - 1).fill_(true);
  slots.valid_BTR = valid.logical_and(window.valid_BT.unsqueeze(2));
  if (window.others_BTLK.defined()) {
    std::vector<at::Tensor> others;
    const at::Tensor& before = window.before_others_BLK;
    for (int64_t k = 0; k < window.others_BTLK.size(3); ++k) {
      others.push_back(SlotRows(window.others_BTLK.select(3, k), window, context,
                                window.num_experts,
                                before.defined() ? before.select(2, k) : at::Tensor()));
    }
    slots.others_BTRK = at::stack(others, 3);
  }
  return slots;
}

at::Tensor NewestExperts(const RoutingWindow& window, int count) {
  const int64_t known = window.source_layer + 1, unknown = window.num_experts;
  if (window.stack == Stack::kEncoder) {
    return LastLayers(window.experts_BTL, known, count, unknown);
  }
  const at::Tensor& all = window.experts_BTL;
  const auto before = OfTokenBefore(all, window.before_BL, unknown);
  return LastLayers(at::cat({before, all.narrow(2, 0, known)}, 2), all.size(2) + known,
                    count, unknown);
}

at::Tensor NewestGates(const RoutingWindow& window, const SpeculationConfig& config,
                       int count) {
  const auto ones = OneHotExperts(NewestExperts(window, count), window.num_experts);
  if (!config.topk_inputs || window.source_layer < 0) return ones;
  RequireGates(window);
  return at::cat({ones.narrow(2, 0, count - 1), window.gates_BTE.unsqueeze(2)}, 2);
}

void RequireGates(const RoutingWindow& window) {
  if (window.gates_BTE.defined()) return;
  throw std::logic_error("no top-k of the router for a model that reads it");
}

at::Tensor SlotMask(const ExpertSlots& slots, Stack stack, TokenMemory* past) {
  return RowMask(slots.valid_BTR, stack, past);
}

at::Tensor TokenMask(const RoutingWindow& window, TokenMemory* past) {
  return RowMask(window.valid_BT.unsqueeze(2), window.stack, past);
}

at::Tensor Sinusoid(int64_t rows, int64_t width, const at::TensorOptions& options,
                    int64_t first) {
  const auto even = at::arange(0, width, 2, options);
  const auto angle = at::arange(first, first + rows, options).unsqueeze(1) *
                     at::exp(even * (-std::log(10000.0) / static_cast<double>(width)));
  return at::stack({angle.sin(), angle.cos()}, 2).view({rows, -1}).narrow(1, 0, width);
}

at::Tensor SequenceMean(const at::Tensor& x_BTD, const RoutingWindow& window,
                        TokenMemory* past) {
  auto weight = window.valid_BT.unsqueeze(2).to(x_BTD.scalar_type());
  if (window.stack == Stack::kEncoder) {
    return (x_BTD * weight).sum(1, true) / weight.sum(1, true).clamp_min(1);
  }
  const auto rows = WithKnown(x_BTD * weight, 1, past);
  weight = WithKnown(weight, 1, past);
  return (rows.cumsum(1) / weight.cumsum(1).clamp_min(1)).slice(1, KnownTokens(past));
}

at::Tensor OneHotExperts(const at::Tensor& ids, int64_t num_experts) {
  return at::one_hot(ids, num_experts + 1).narrow(-1, 0, num_experts).to(at::kFloat);
}

at::Tensor Mixed(const at::Tensor& x, const TrainingHints& hints) {
  if (!hints.order_B.defined()) return x;
  std::vector<int64_t> rows(static_cast<size_t>(x.dim()), 1);
  rows[0] = x.size(0);
  const auto share = hints.share_B.view(rows);
  return x * share + x.index_select(0, hints.order_B) * (1 - share);
}

RoutingWindow ForMembers(const RoutingWindow& window, int64_t members) {
  if (members == 1) return window;
  RoutingWindow all = window;
  for (at::Tensor* x :
       {&all.token_ids_BT, &all.valid_BT, &all.experts_BTL, &all.others_BTLK,
        &all.before_BL, &all.before_others_BLK, &all.hidden_BTD, &all.context_BTD,
        &all.source_BSD, &all.source_valid_BS, &all.gates_BTE, &all.attention_entropy_BTA,
        &all.attended_ids_BTAK, &all.training.teacher_BTH, &all.training.share_B,
        &all.training.hidden_ids_BTL}) {
    *x = Repeat(*x, members);
  }
  if (all.training.order_B.defined()) {  // partners within the member
    const int64_t B = window.token_ids_BT.size(0);
    const auto first = at::arange(members, window.training.order_B.options()).mul(B);
    all.training.order_B =
        (window.training.order_B.unsqueeze(0) + first.unsqueeze(1)).flatten();
  }
  return all;
}

}  // namespace routecast
