// What a model's outputs cost on a batch.
// B windows, T tokens, H leads, E experts, K experts a token, N rows that count.
#pragma once

#include <string>

#include "trainer/speculation_batch.h"

namespace routecast {

struct LossSum {
  at::Tensor total;  // [], summed over labels; what backward runs from
  int64_t labels = 0;
};
// What a confidence c is held against: cross-entropy or squared distance of "the top-1 is
// right", or, published with two of the original's models, (c - .5)^2.
enum class ConfidenceForm { kCrossEntropy, kSquared, kHalf };
ConfidenceForm ConfidenceFormOf(const std::string& name);  // of --confidence_loss
struct LossWeights {
  double confidence = 0;  // of what confidence_form says
  double next_token = 0;  // of the next token's id, where the model guesses it
  double set = 0;         // of the encoder's set prediction (speculation_sets.h)
  double distill = 0;     // share of the loss that is towards the router's own top-k
  double distill_temperature = 1;
  double label_smoothing = 0;
  double contrastive = 0;  // of ContrastiveLoss, where the model embeds experts
  double backup = 0;       // of BackupLoss, where the model has heads for further choices
  double consistency = 0;  // of ConsistencyLoss
  double diversity = 0;    // of DiversityLoss
  bool focal = false;      // FocalCrossEntropy instead of RoutingCrossEntropy
  ConfidenceForm confidence_form = ConfidenceForm::kCrossEntropy;
  // What the entropy of the pattern memory's weights takes off, where a model has one:
  // the mean over labels of that of the label's token.
  double pattern_entropy = 0;
};
// Cross-entropy of the routing and what the weights add to it (of a batch with mixup, of
// the labels of both sequences by their shares). CUDA: enqueued; the host does not wait.
LossSum SpeculationLoss(const SpeculationOutput& output, const SpeculationBatch& batch,
                        const LossWeights& weights);

// Of the plain labels, as sums over them.
struct RoutingScores {
  double cross_entropy = 0, top1 = 0, top4 = 0;  // of the first choice the latter two
  double recall = 0;  // of the K experts among the K likeliest; K = 1: top1
  int64_t labels = 0;
};
RoutingScores ScoresOf(const SpeculationOutput& output, const SpeculationBatch& batch);

// [N]: the mean over a row's K experts (int64 [N,K]) of -log softmax(logits)[expert];
// least where all K are equally likely and nothing else is.
at::Tensor RoutingCrossEntropy(const at::Tensor& logits_NE, const at::Tensor& truth_NK,
                               double label_smoothing = 0);

// The published focal form of it: of each expert .25 (1 - p)^2 times its cross-entropy,
// the mean over the K.
at::Tensor FocalCrossEntropy(const at::Tensor& logits_NE, const at::Tensor& truth_NK,
                             double label_smoothing = 0);

// [N]: the mean over K heads of the cross-entropy of each with the router's choice that
// it is for.
at::Tensor BackupLoss(const at::Tensor& backups_NKE, const at::Tensor& choices_NK);

// Over neighbouring tokens that both have a label (int64 [B,T,H], -100 = none), the sum
// of (cosine of their logits - [same expert])^2: answers change where the routing does.
at::Tensor ConsistencyLoss(const at::Tensor& logits_BTHE, const at::Tensor& labels_BTH);

// N times KL(uniform || mean of the rows' probabilities): all experts are named.
at::Tensor DiversityLoss(const at::Tensor& logits_NE);

// [N]: InfoNCE at temperature .1 between what a model makes of a lead and its embeddings
// of the experts: -log softmax(cosines / .1) of the true experts, the mean over the K.
at::Tensor ContrastiveLoss(const at::Tensor& features_ND, const at::Tensor& keys_ED,
                           const at::Tensor& truth_NK);

}  // namespace routecast
