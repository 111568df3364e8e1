// What a token may look at among expert ids: the rows that models of expert ids attend
// to. B sequences, T tokens, W context layers, R rows a token, E experts, D width.
#pragma once

#include <algorithm>

#include "models/routing_window.h"
#include "models/speculation_config.h"
#include "models/speculation_layers.h"
#include "models/token_memory.h"

namespace routecast {

// Encoder: R = W, the token's own newest W layers. Decoder: R = 2 W, the previous token's
// last W layers before them, so that every row of token t holds only what is known at (t,
// source layer), and a mask over tokens suffices for causality. Oldest first,
// right-aligned.
struct ExpertSlots {
  at::Tensor ids_BTR;    // int64, E = padding
  at::Tensor valid_BTR;  // bool
  // The further choices of the same rows [B,T,R,K-1]; undefined where the window has
  // none.
  at::Tensor others_BTRK;
};
ExpertSlots SlotsOf(const RoutingWindow& window, int context);
// The rows of SlotsOf filled from any ids [B,T,L], `padding` where there is no layer.
// `before_BL`: those of the token before the first; undefined = there is none.
at::Tensor SlotRows(const at::Tensor& ids_BTL, const RoutingWindow& window, int context,
                    int64_t padding, const at::Tensor& before_BL = {});
// The layers that a model of `context` looks at in this window.
inline int ContextOf(const RoutingWindow& window, int context) {
  return window.context_layers > 0 ? std::min(context, window.context_layers) : context;
}

// The newest `count` layers that are known at each token, newest last: the own token's up
// to the source, before them in the decoder the previous token's. [B,T,count], E = none.
at::Tensor NewestExperts(const RoutingWindow& window, int count);

// What the router made of those layers [B,T,count,E]: 1 at the expert, zeros where it is
// unknown; with topk_inputs the newest one's probabilities where the source is a layer.
at::Tensor NewestGates(const RoutingWindow& window, const SpeculationConfig& config,
                       int count);
// Throws std::logic_error where a window from a layer holds no gates_BTE.
void RequireGates(const RoutingWindow& window);

// Additive mask [B,1,1 or T*R,T*R] over all rows of all tokens, token-major: real rows,
// and in the decoder none of a later token. With `past` its known tokens' rows precede
// the others in the last dimension.
at::Tensor SlotMask(const ExpertSlots& slots, Stack stack, TokenMemory* past = nullptr);
// Additive mask [B,1,1 or T,T] over tokens, with the same rules.
at::Tensor TokenMask(const RoutingWindow& window, TokenMemory* past = nullptr);

// Fixed sinusoid of rows first..first+rows-1: sin at even columns, cos at odd ones, base
// 10000.
at::Tensor Sinusoid(int64_t rows, int64_t width, const at::TensorOptions& options,
                    int64_t first = 0);

// What is known of the tokens around: encoder, the mean over real tokens [B,1,D];
// decoder, the mean over the tokens up to each [B,T,D].
at::Tensor SequenceMean(const at::Tensor& x_BTD, const RoutingWindow& window,
                        TokenMemory* past = nullptr);

// 1 at the expert's place, zeros where it is unknown. [.., E] float32.
at::Tensor OneHotExperts(const at::Tensor& ids, int64_t num_experts);

// Mixup of x [B, ..], a function of the window's experts (TrainingHints); x itself where
// there is none.
at::Tensor Mixed(const at::Tensor& x, const TrainingHints& hints);

// Every tensor of the window repeated for M members, one after another.
RoutingWindow ForMembers(const RoutingWindow& window, int64_t members);

}  // namespace routecast
