// The losses of conditional generation. Reference: transformers 5.23.0,
// SwitchTransformersForConditionalGeneration. Shape letters: B sequences, S source
// tokens, T target tokens, E experts, V vocabulary.
#pragma once

#include "models/switch_model.h"

namespace routecast {

inline constexpr int64_t kIgnoredLabel = -100;

// Scalars, differentiable where the model is. Router losses of a stack are 0 where its
// sparse step is 1 (the reference leaves them out there) or it has no experts.
struct ConditionalLosses {
  at::Tensor logits_BTV;
  at::Tensor cross_entropy;  // mean over the labels that are not ignored; in the model's
                             // dtype; NaN where all are ignored
  at::Tensor encoder_z, encoder_aux, decoder_z, decoder_aux;  // in the router's dtype
  at::Tensor total;  // cross entropy + coefficients of the configuration * the others
};

// Decoder inputs: the labels shifted right behind the start token, ignored ones as
// padding.
at::Tensor ShiftRight(const SwitchConfig& config, const at::Tensor& labels_BT);

// Mean over tokens of logsumexp(logits)^2. logits [B,T,E], a stack's layers along T.
at::Tensor RouterZLoss(const at::Tensor& logits_BTE);
// E^2 * mean over sequences and experts of (share of tokens routed to it * its mean
// probability); routed = argmax of the raw logits, before capacity.
at::Tensor LoadBalancingLoss(const at::Tensor& logits_BTE);

// Teacher forcing. ids and valid [B,S] as in SwitchModel::Encode; labels int64 [B,T] on
// the CPU. Padding counts in the router losses, as it is routed. options.observer sees
// both passes.
ConditionalLosses ComputeLosses(SwitchModel* model, const at::Tensor& ids_BS,
                                const at::Tensor& valid_BS, const at::Tensor& labels_BT,
                                const ForwardOptions& options = {});

}  // namespace routecast
