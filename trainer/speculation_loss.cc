#include "trainer/speculation_loss.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "trainer/speculation_sets.h"

namespace routecast {
namespace {

constexpr int64_t kIgnore = -100;
constexpr double kLargestConfidence = 1 - 1e-6;  // keeps the logarithm finite

// KL(teacher || student) a row, of the router's top-k with the rest spread evenly over
// the other experts; both at `temperature`.
at::Tensor Distillation(const at::Tensor& logits_NE, const at::Tensor& ids_NK,
                        const at::Tensor& probs_NK, double temperature) {
  const int64_t experts = logits_NE.size(1), k = ids_NK.size(1);
  const auto left = (1 - probs_NK.sum(1, true)).clamp_min(0) /
                    static_cast<double>(std::max<int64_t>(1, experts - k));
  auto teacher = left.expand({-1, experts}).contiguous().scatter(1, ids_NK, probs_NK);
  teacher = teacher.clamp_min(1e-8).pow(1 / temperature);
  teacher = teacher / teacher.sum(1, true);
  const auto student = at::log_softmax(logits_NE / temperature, 1);
  return (teacher * (teacher.log() - student)).sum(1) * (temperature * temperature);
}

at::Tensor NextTokenLoss(const SpeculationOutput& output, const SpeculationBatch& batch) {
  const int64_t tokens = batch.window.token_ids_BT.size(1);
  const auto next = [&](const at::Tensor& x) { return x.narrow(1, 1, tokens - 1); };
  const at::Tensor ids =
      next(batch.window.token_ids_BT)
          .masked_fill(next(batch.window.valid_BT).logical_not(), kIgnore)
          .to(output.next_token_BTV.device());
  return at::cross_entropy_loss(
      output.next_token_BTV.narrow(1, 0, tokens - 1).flatten(0, 1), ids.flatten(), {},
      at::Reduction::Sum, kIgnore);
}

void RequireFinite(const at::Tensor& total, const SpeculationBatch& batch) {
  if (std::isfinite(total.item<double>())) return;
  throw std::logic_error("the loss is not finite in micro-batch " +
                         std::to_string(batch.id) + " (" + StackName(batch.window.stack) +
                         ", source layer " + std::to_string(batch.window.source_layer) +
                         ")");
}

}  // namespace

at::Tensor RoutingCrossEntropy(const at::Tensor& logits_NE, const at::Tensor& truth_NK,
                               double label_smoothing) {
  if (truth_NK.size(1) == 1) {
    return at::cross_entropy_loss(logits_NE, truth_NK.squeeze(1), {}, at::Reduction::None,
                                  kIgnore, label_smoothing);
  }
  const auto log_probs = at::log_softmax(logits_NE, 1);
  return -((1 - label_smoothing) * log_probs.gather(1, truth_NK).mean(1) +
           label_smoothing * log_probs.mean(1));
}

LossSums SpeculationLoss(const SpeculationOutput& output, const SpeculationBatch& batch,
                         const LossWeights& weights) {
  const int64_t experts = output.logits_BTHE.size(-1);
  const auto device = output.logits_BTHE.device();
  const at::Tensor labels = batch.labels_BTH.to(device).flatten();
  const at::Tensor rows = labels.ne(kIgnore).nonzero().squeeze(1);
  const at::Tensor logits =
      output.logits_BTHE.reshape({-1, experts}).index_select(0, rows);
  const at::Tensor truth =
      LabelSets(batch).to(device).flatten(0, 2).index_select(0, rows);  // [N,K]
  at::Tensor weight;
  if (batch.weights_BT.defined()) {
    weight = batch.weights_BT.to(device)
                 .unsqueeze(2)
                 .expand(batch.labels_BTH.sizes())
                 .flatten()
                 .index_select(0, rows);
  }
  const auto sum = [&](const at::Tensor& x) {
    return weight.defined() ? (x * weight).sum() : x.sum();
  };
  at::Tensor routing = sum(RoutingCrossEntropy(logits, truth, weights.label_smoothing));
  if (weights.distill > 0 && batch.teacher_ids_BTHK.defined()) {
    const int64_t k = batch.teacher_ids_BTHK.size(3);
    const auto teacher = [&](const at::Tensor& x) {
      return x.to(device).reshape({-1, k}).index_select(0, rows);
    };
    routing = routing * (1 - weights.distill) +
              weights.distill * sum(Distillation(logits, teacher(batch.teacher_ids_BTHK),
                                                 teacher(batch.teacher_probs_BTHK),
                                                 weights.distill_temperature));
  }
  LossSums sums;
  sums.labels = rows.size(0);
  sums.total = routing;
  const at::Tensor scores = logits.detach();
  const at::Tensor ahead = scores.unsqueeze(1)
                               .gt(scores.gather(1, truth).unsqueeze(2))
                               .sum(2);  // experts above each true one, [N,K]
  const at::Tensor right = ahead.eq(0).any(1).to(at::kFloat);
  if (weights.confidence > 0 && output.confidence_BTH.requires_grad()) {
    const at::Tensor confidence =
        output.confidence_BTH.flatten().index_select(0, rows).clamp(
            1 - kLargestConfidence, kLargestConfidence);
    sums.total = sums.total +
                 weights.confidence * sum(at::binary_cross_entropy(confidence, right, {},
                                                                   at::Reduction::None));
  }
  if (weights.next_token > 0 && output.next_token_BTV.defined() &&
      batch.window.token_ids_BT.size(1) > 1) {
    sums.total = sums.total + weights.next_token * NextTokenLoss(output, batch);
  }
  if (weights.set > 0 && batch.window.stack == Stack::kEncoder) {
    sums.total = sums.total +
                 weights.set * SetLoss(output.logits_BTHE, LabelSets(batch).to(device));
  }
  if (output.own_loss.defined() && output.logits_BTHE.requires_grad()) {
    sums.total = sums.total + output.own_loss.sum();
  }
  sums.cross_entropy = RoutingCrossEntropy(scores, truth).sum().item<double>();
  sums.top1 = ahead.select(1, 0).eq(0).sum().item<double>();
  sums.top4 = ahead.select(1, 0).lt(4).sum().item<double>();
  const int64_t chosen = truth.size(1);
  sums.recall = ahead.lt(chosen).sum().item<double>() / static_cast<double>(chosen);
  RequireFinite(sums.total, batch);
  return sums;
}

}  // namespace routecast
