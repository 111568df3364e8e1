// The model offers its routing to whoever listens; it knows nobody who does.
// Shape letters: B sequences, T tokens of this pass, E experts, D model width.
#pragma once

#include <ATen/core/Tensor.h>

#include "common/routing.h"

namespace routecast {

// One pass of one stack: the encoder's, or one decoder call (teacher forcing: all tokens;
// incremental decoding: one token a sequence). What lies on the CPU is not written over
// any more.
struct PassInfo {
  Stack stack = Stack::kEncoder;
  at::Tensor token_ids_BT;  // int64, on the CPU
  at::Tensor valid_BT;      // bool, on the CPU; false = padding
  int first_position = 0;   // of the pass' first token in its sequence
  // Decoder, where a replay knows them: router inputs of the encoder's last MoE layer
  // (float32, on the CPU), and which of its tokens are real. Else undefined.
  at::Tensor source_BSD{}, source_valid_BS{};
  // At the decoder's end: its output after the last norm, model dtype, on the model's
  // device. Else undefined.
  at::Tensor output_BTD{};
};

// One MoE layer's decision. Tensors live on the model's device and are valid during the
// call; what they hold is not written over before OnPassEnd has returned.
struct LayerRouting {
  int layer = 0;             // global MoE layer (MoeGeometry)
  at::Tensor input_BTD;      // the router's input: normed hidden state, model dtype
  at::Tensor logits_BTE;     // fp32, raw
  at::Tensor expert_ids_BT;  // int64, the choice before capacity
  at::Tensor gate_probs_BT;  // probability of the choice, model dtype
  at::Tensor dropped_BT;     // bool: capacity dropped the token
  at::Tensor margins_BT{};   // fp32: largest logit minus the second; may be undefined
  // Recorded models that take K > 1 experts a token: the further choices by falling
  // probability, int64 [B,T,K-1]. Else undefined.
  at::Tensor other_ids_BTK{};
};

// The attention of a block with an MoE layer, on the model's device; valid like a
// LayerRouting.
struct LayerAttention {
  int layer = 0;            // global MoE layer
  bool cross = false;       // over the encoder's tokens; else over the stack's own
  at::Tensor weights_BHTS;  // model dtype; H heads, S keys; 0 at padding and later tokens
};

// Called on the forward thread, in layer order. Absent (nullptr) costs nothing.
class RoutingObserver {
 public:
  virtual ~RoutingObserver() = default;
  virtual void OnPassBegin(const PassInfo& pass) = 0;
  // After the router's choice and before the layer's experts run.
  virtual void OnRouting(const LayerRouting& routing) = 0;
  // Asked for by who returns true here: each layer's attention, before its OnRouting;
  // decoder: self-attention, then cross-attention.
  virtual bool WantsAttention() const { return false; }
  virtual void OnAttention(const LayerAttention&) {}
  virtual void OnPassEnd(const PassInfo& pass) = 0;
};

}  // namespace routecast
