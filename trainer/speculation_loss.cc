#include "trainer/speculation_loss.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <stdexcept>

#include "trainer/speculation_sets.h"

namespace routecast {
namespace {

constexpr int64_t kIgnore = -100;
constexpr double kContrastiveTemperature = 0.1;
constexpr double kFocalShare = 0.25;
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

at::Tensor FocalCrossEntropy(const at::Tensor& logits_NE, const at::Tensor& truth_NK,
                             double label_smoothing) {
  const auto log_probs = at::log_softmax(logits_NE, 1);
  const auto own = log_probs.gather(1, truth_NK);
  const auto cost =
      -((1 - label_smoothing) * own + label_smoothing * log_probs.mean(1, true));
  return (kFocalShare * (1 - own.exp()).square() * cost).mean(1);
}

at::Tensor BackupLoss(const at::Tensor& backups_NKE, const at::Tensor& choices_NK) {
  return at::cross_entropy_loss(backups_NKE.flatten(0, 1), choices_NK.flatten(), {},
                                at::Reduction::None)
      .view(choices_NK.sizes())
      .mean(1);
}

at::Tensor ConsistencyLoss(const at::Tensor& logits_BTHE, const at::Tensor& labels_BTH) {
  const int64_t pairs = labels_BTH.size(1) - 1;
  if (pairs < 1) return logits_BTHE.sum() * 0;
  const auto before = labels_BTH.narrow(1, 0, pairs);
  const auto after = labels_BTH.narrow(1, 1, pairs);
  const auto counts = before.ne(kIgnore).logical_and(after.ne(kIgnore));
  const auto cosines = at::cosine_similarity(logits_BTHE.narrow(1, 0, pairs),
                                             logits_BTHE.narrow(1, 1, pairs), 3);
  return ((cosines - before.eq(after).to(at::kFloat)).square() * counts).sum();
}

at::Tensor DiversityLoss(const at::Tensor& logits_NE) {
  const auto rows = static_cast<double>(logits_NE.size(0));
  const auto experts = static_cast<double>(logits_NE.size(1));
  if (rows == 0) return logits_NE.sum();
  const auto mean = at::softmax(logits_NE, 1).mean(0).clamp_min(1e-8);
  return (mean * experts).log().mean() * -rows;
}

at::Tensor ContrastiveLoss(const at::Tensor& features_ND, const at::Tensor& keys_ED,
                           const at::Tensor& truth_NK) {
  const auto unit = [](const at::Tensor& x) {
    return x / x.norm(2, {1}, true).clamp_min(1e-8);
  };
  const auto cosines = at::mm(unit(features_ND), unit(keys_ED).t());
  return RoutingCrossEntropy(cosines / kContrastiveTemperature, truth_NK);
}

namespace {

// Labels that count: their rows among B * T * H, all experts of each, and how much each
// counts (undefined: 1).
struct Targets {
  at::Tensor rows, truth_NK, weight_N;
  at::Tensor Sum(const at::Tensor& x) const {
    return weight_N.defined() ? (x * weight_N).sum() : x.sum();
  }
};

Targets TargetsOf(const at::Tensor& sets_BTHK, const at::Tensor& weight_BT,
                  at::Device device) {
  Targets targets;
  const auto first = sets_BTHK.select(3, 0);
  const auto rows = first.flatten().ne(kIgnore).nonzero().squeeze(1);
  targets.truth_NK = sets_BTHK.flatten(0, 2).index_select(0, rows).to(device);
  if (weight_BT.defined()) {
    const auto all = weight_BT.unsqueeze(2).expand(first.sizes()).flatten();
    targets.weight_N = all.index_select(0, rows).to(device);
  }
  targets.rows = rows.to(device);
  return targets;
}

// What tokens count: as augmentation says, times `share_B` where a batch is mixed.
at::Tensor Weights(const SpeculationBatch& batch, const at::Tensor& share_B) {
  if (!share_B.defined()) return batch.weights_BT;
  const auto share = share_B.unsqueeze(1).expand(batch.window.valid_BT.sizes());
  return batch.weights_BT.defined() ? batch.weights_BT * share : share;
}

at::Tensor RowsOf(const at::Tensor& x_BTHX, const Targets& targets) {
  return x_BTHX.reshape({-1, x_BTHX.size(3)}).index_select(0, targets.rows);
}

// Experts with a larger logit than each true one, [N,K].
at::Tensor ExpertsAhead(const at::Tensor& logits_NE, const at::Tensor& truth_NK) {
  return logits_NE.unsqueeze(1).gt(logits_NE.gather(1, truth_NK).unsqueeze(2)).sum(2);
}

// LibTorch's loss refuses what is no number (on a GPU by ending the device's context), so
// that the sum is told apart: it says so, and the training names what it came from.
at::Tensor ConfidenceLoss(const at::Tensor& confidence_N, const at::Tensor& right_N,
                          ConfidenceForm form) {
  if (form == ConfidenceForm::kSquared) return (confidence_N - right_N).square();
  if (form == ConfidenceForm::kHalf) return (confidence_N - 0.5).square();
  const auto share =
      confidence_N.clamp(1 - kLargestConfidence, kLargestConfidence).nan_to_num(0.5);
  const auto nothing_or_nan = confidence_N.detach().sum() * 0;
  return at::binary_cross_entropy(share, right_N, {}, at::Reduction::None) +
         nothing_or_nan;
}

at::Tensor RoutingLoss(const SpeculationOutput& output, const Targets& targets,
                       const LossWeights& weights) {
  const auto cost = weights.focal ? FocalCrossEntropy : RoutingCrossEntropy;
  at::Tensor loss = targets.Sum(cost(RowsOf(output.logits_BTHE, targets),
                                     targets.truth_NK, weights.label_smoothing));
  if (weights.contrastive > 0 && output.features_BTHD.defined()) {
    loss = loss + weights.contrastive * targets.Sum(ContrastiveLoss(
                                            RowsOf(output.features_BTHD, targets),
                                            output.expert_keys_ED, targets.truth_NK));
  }
  return loss;
}

// The labels of each sequence's partner where the sequence itself has a token.
Targets PartnersOf(const SpeculationBatch& batch, at::Device device) {
  const TrainingHints& hints = batch.window.training;
  const auto absent = batch.window.valid_BT.logical_not().unsqueeze(2).unsqueeze(3);
  const auto sets = LabelSets(batch).index_select(0, hints.order_B);
  return TargetsOf(sets.masked_fill(absent, kIgnore), Weights(batch, 1 - hints.share_B),
                   device);
}

}  // namespace

ConfidenceForm ConfidenceFormOf(const std::string& name) {
  if (name == "squared") return ConfidenceForm::kSquared;
  return name == "half" ? ConfidenceForm::kHalf : ConfidenceForm::kCrossEntropy;
}

LossSum SpeculationLoss(const SpeculationOutput& output, const SpeculationBatch& batch,
                        const LossWeights& weights) {
  const auto device = output.logits_BTHE.device();
  const TrainingHints& hints = batch.window.training;
  const Targets targets =
      TargetsOf(LabelSets(batch), Weights(batch, hints.share_B), device);
  const at::Tensor logits = RowsOf(output.logits_BTHE, targets);
  const at::Tensor& rows = targets.rows;
  at::Tensor routing = RoutingLoss(output, targets, weights);
  if (hints.order_B.defined()) {
    routing = routing + RoutingLoss(output, PartnersOf(batch, device), weights);
  }
  const auto teacher = [&](const at::Tensor& x) {
    return x.to(device).flatten(0, 2).index_select(0, rows);
  };
  if (weights.distill > 0 && batch.teacher_probs_BTHK.defined()) {
    routing = routing * (1 - weights.distill) +
              weights.distill *
                  targets.Sum(Distillation(logits, teacher(batch.teacher_ids_BTHK),
                                           teacher(batch.teacher_probs_BTHK),
                                           weights.distill_temperature));
  }
  if (weights.backup > 0 && output.backups_BTHKE.defined()) {
    if (!batch.teacher_ids_BTHK.defined()) {
      throw std::logic_error("backup experts without the router's choices");
    }
    const auto backups = output.backups_BTHKE.flatten(0, 2).index_select(0, rows);
    const auto choices = teacher(batch.teacher_ids_BTHK).narrow(1, 1, backups.size(1));
    routing = routing + weights.backup * targets.Sum(BackupLoss(backups, choices));
  }
  LossSum sums{routing, rows.size(0)};
  if (weights.confidence > 0 && output.confidence_BTH.requires_grad()) {
    const at::Tensor right =
        ExpertsAhead(logits.detach(), targets.truth_NK).eq(0).any(1).to(at::kFloat);
    sums.total =
        sums.total +
        weights.confidence * targets.Sum(ConfidenceLoss(
                                 output.confidence_BTH.flatten().index_select(0, rows),
                                 right, weights.confidence_form));
  }
  if (weights.pattern_entropy > 0 && output.pattern_entropy_BT.defined()) {
    const auto by_lead =
        output.pattern_entropy_BT.unsqueeze(2).expand(output.confidence_BTH.sizes());
    sums.total = sums.total - weights.pattern_entropy *
                                  targets.Sum(by_lead.flatten().index_select(0, rows));
  }
  if (weights.next_token > 0 && output.next_token_BTV.defined() &&
      batch.window.token_ids_BT.size(1) > 1) {
    sums.total = sums.total + weights.next_token * NextTokenLoss(output, batch);
  }
  if (weights.set > 0 && batch.window.stack == Stack::kEncoder) {
    sums.total = sums.total +
                 weights.set * SetLoss(output.logits_BTHE, LabelSets(batch).to(device));
  }
  if (weights.consistency > 0) {
    sums.total =
        sums.total + weights.consistency *
                         ConsistencyLoss(output.logits_BTHE, batch.labels_BTH.to(device));
  }
  if (weights.diversity > 0) {
    sums.total = sums.total + weights.diversity * DiversityLoss(logits);
  }
  if (output.own_loss.defined() && output.logits_BTHE.requires_grad()) {
    sums.total = sums.total + output.own_loss.sum();
  }
  return sums;
}

RoutingScores ScoresOf(const SpeculationOutput& output, const SpeculationBatch& batch) {
  const Targets targets = TargetsOf(LabelSets(batch), {}, output.logits_BTHE.device());
  const at::Tensor logits = RowsOf(output.logits_BTHE, targets).detach();
  const at::Tensor& truth = targets.truth_NK;
  const at::Tensor ahead = ExpertsAhead(logits, truth);
  const int64_t chosen = truth.size(1);
  const auto sum = [](const at::Tensor& x) { return x.sum().item<double>(); };
  return {sum(RoutingCrossEntropy(logits, truth)), sum(ahead.select(1, 0).eq(0)),
          sum(ahead.select(1, 0).lt(4)),
          sum(ahead.lt(chosen)) / static_cast<double>(chosen), truth.size(0)};
}

}  // namespace routecast
