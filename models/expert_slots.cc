#include "models/expert_slots.h"

#include <ATen/ATen.h>

#include <cmath>

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

at::Tensor Repeat(const at::Tensor& x, int64_t members) {
  if (!x.defined()) return x;
  std::vector<int64_t> times(static_cast<size_t>(x.dim()), 1);
  times[0] = members;
  return x.repeat(times);
}

}  // namespace

at::Tensor SlotRows(const at::Tensor& ids_BTL, const RoutingWindow& window, int context,
                    int64_t padding) {
  const auto own = LastLayers(ids_BTL, window.source_layer + 1, context, padding);
  if (window.stack == Stack::kEncoder) return own;
  const auto all = LastLayers(ids_BTL, ids_BTL.size(2), context, padding);
  const auto before = at::cat(
      {at::full_like(all.narrow(1, 0, 1), padding), all.narrow(1, 0, all.size(1) - 1)},
      1);
  return at::cat({before, own}, 2);
}

ExpertSlots SlotsOf(const RoutingWindow& window, int context) {
  ExpertSlots slots;
  slots.ids_BTR = SlotRows(window.experts_BTL, window, context, window.num_experts);
  auto valid = slots.ids_BTR.ne(window.num_experts);
  // The newest slot always counts: before the first layer its padding id says just that.
  valid.select(2, valid.size(2) - 1).fill_(true);
  slots.valid_BTR = valid.logical_and(window.valid_BT.unsqueeze(2));
  if (window.others_BTLK.defined()) {
    std::vector<at::Tensor> others;
    for (const at::Tensor& choice : window.others_BTLK.unbind(3)) {
      others.push_back(SlotRows(choice, window, context, window.num_experts));
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
  const auto before = at::cat(
      {at::full_like(all.narrow(1, 0, 1), unknown), all.narrow(1, 0, all.size(1) - 1)},
      1);
  return LastLayers(at::cat({before, all.narrow(2, 0, known)}, 2), all.size(2) + known,
                    count, unknown);
}

at::Tensor SlotMask(const ExpertSlots& slots, Stack stack) {
  const int64_t B = slots.ids_BTR.size(0), T = slots.ids_BTR.size(1);
  const int64_t R = slots.ids_BTR.size(2);
  auto may = slots.valid_BTR.view({B, 1, 1, T * R});
  if (stack == Stack::kDecoder) {
    const auto token = at::arange(T * R, slots.ids_BTR.options()).floor_divide(R);
    may = may.logical_and(token.unsqueeze(0).le(token.unsqueeze(1)));
  }
  return AdditiveMask(may);
}

at::Tensor TokenMask(const RoutingWindow& window) {
  const int64_t B = window.valid_BT.size(0), T = window.valid_BT.size(1);
  auto may = window.valid_BT.view({B, 1, 1, T});
  if (window.stack == Stack::kDecoder) {
    const auto token = at::arange(T, window.token_ids_BT.options());
    may = may.logical_and(token.unsqueeze(0).le(token.unsqueeze(1)));
  }
  return AdditiveMask(may);
}

at::Tensor Sinusoid(int64_t rows, int64_t width, const at::TensorOptions& options) {
  const auto even = at::arange(0, width, 2, options);
  const auto angle = at::arange(rows, options).unsqueeze(1) *
                     at::exp(even * (-std::log(10000.0) / static_cast<double>(width)));
  return at::stack({angle.sin(), angle.cos()}, 2).view({rows, -1}).narrow(1, 0, width);
}

at::Tensor SequenceMean(const at::Tensor& x_BTD, const RoutingWindow& window) {
  const auto weight = window.valid_BT.unsqueeze(2).to(x_BTD.scalar_type());
  if (window.stack == Stack::kEncoder) {
    return (x_BTD * weight).sum(1, true) / weight.sum(1, true).clamp_min(1);
  }
  return (x_BTD * weight).cumsum(1) / weight.cumsum(1).clamp_min(1);
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
        &all.hidden_BTD, &all.context_BTD, &all.source_BSD, &all.source_valid_BS,
        &all.attention_entropy_BTA, &all.attended_ids_BTAK, &all.training.teacher_BTH,
        &all.training.share_B, &all.training.hidden_ids_BTL}) {
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
