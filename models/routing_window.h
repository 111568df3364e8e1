// The only features of prediction, used in training and in serving alike.
// B sequences, T tokens, S encoder tokens of a decoder's sequences, L MoE layers of the
// stack, E experts, D router input width.
//
// A window is seen from a *source layer* s of one stack (in-stack index, -1 = before the
// first MoE layer): at the newest token, layers 0..s are routed and known. A *lead* d >=
// 1 asks for in-stack layer s + d. In the decoder a target s + d >= L is layer s + d - L
// of the next token (whose id is not known); the encoder has no such leads.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "common/routing.h"

namespace routecast {

// What training adds to a window; a served one has none of it.
struct TrainingHints {
  // int64 true experts of the leads, -100 = none: what a kind that decodes lead by lead
  // is given of the leads before each.
  at::Tensor teacher_BTH;
  // Mixup: sequence b's embeddings become share_B * own + (1 - share_B) * those of
  // sequence order_B[b]. Undefined = none.
  at::Tensor order_B, share_B;
  double noise = 0;  // standard deviation of what is added to embeddings
  // int64: where the window hides a known expert, the true one, else -100; models that
  // embed experts predict it. Undefined = none.
  at::Tensor hidden_ids_BTL;
  bool pattern_entropy = false;  // is part of the loss (SpeculationOutput)
};

struct RoutingWindow {
  Stack stack = Stack::kEncoder;
  int source_layer = -1;
  int num_layers = 0;       // L
  int num_experts = 0;      // E; id E means "unknown" or padding
  int64_t first_token = 0;  // place in its sequence of each row's first token
  at::Tensor token_ids_BT;  // int64, padding 0
  at::Tensor valid_BT;      // bool, true = real token
  // int64. Encoder: columns <= source_layer known for all tokens, others E. Decoder,
  // causal: entry (t, l) is the token's own expert for every l; a consumer at token t may
  // use row t only up to source_layer and rows < t wholly (models mask; see
  // speculation_model.h).
  at::Tensor experts_BTL;
  // Models that route to K > 1 experts: the further choices by falling probability,
  // [B,T,L,K-1], known and unknown where experts_BTL is; undefined = one expert a token,
  // or not recorded.
  at::Tensor others_BTLK;
  // Decoder: these two of the token before the window's first, where its tokens are the
  // later ones of a sequence (WithoutTokens); undefined = there is none, or not known.
  at::Tensor before_BL, before_others_BLK;
  // float32 router input at source_layer; undefined = not available
  at::Tensor hidden_BTD;
  // Decoder: float32 router input of the token before at the last MoE layer, zeros where
  // there is none; undefined = zeros, or not recorded. What the model is about to say
  // next is in it.
  at::Tensor context_BTD;
  // Decoder: float32 router inputs of the encoder's last MoE layer over the S tokens that
  // the decoder attends to, and which of them are real; undefined = not available.
  at::Tensor source_BSD;
  at::Tensor source_valid_BS;  // bool; defined with source_BSD
  // What each token looked at in the block of the source layer, by the A heads that
  // RoutingSpan has: the entropy of the weights (float32, nats), and the ids of the K
  // tokens with the largest (int64, -1 = none). In a decoder's self-attention no later
  // token than the own. Undefined = not recorded, or before the first layer.
  at::Tensor attention_entropy_BTA, attended_ids_BTAK;
  // float32, the router's probabilities at source_layer of its likeliest experts, 0 of
  // the others [B,T,E]. Undefined = not recorded, or before the first layer (AddGates).
  at::Tensor gates_BTE;
  // Models that embed experts look at so many of the newest layers at most; 0 = at their
  // own context.
  int context_layers = 0;
  int traced_model = 0;  // whose routing it is, of several (joint_model.h)
  TrainingHints training;
};

// True where a window of this source can hold router inputs.
inline bool SeesRouterInputs(Stack stack, int source_layer) {
  return source_layer >= 0 || stack == Stack::kDecoder;
}

// Labels for (window, lead): the true expert per token, -100 where there is none
// (padding, dropped by capacity, beyond the sequence).
at::Tensor WindowLabels(const RoutingTrace& trace, Stack stack, int source_layer,
                        int lead);
// Leads 1..H of several sequences at once, tokens padded on the right to the longest.
struct WindowTargets {
  at::Tensor labels_BTH;  // WindowLabels
  // Models of K > 1 experts a token: the further choices by falling probability
  // [B,T,H,K-1]; undefined where K is 1.
  at::Tensor others_BTHK;
  int64_t num_labels = 0;  // of labels_BTH, that count
};
// Throws DataError where a trace does not hold K experts a token.
WindowTargets WindowTargetsOf(const std::vector<const RoutingTrace*>& traces, Stack stack,
                              int source_layer, int leads, int experts_per_token);

// Windows of recorded sequences, one a row: tokens are padded on the right to the
// longest. Router inputs are undefined where one of the sequences has none, or where
// they are not wanted, and so is attention; further choices likewise where there are
// fewer than experts_per_token. Allocates tensors and fills them in plain loops: no
// operation that LibTorch runs in parallel, so a thread that makes batches beside the
// training thread starts no threads of its own. Throws std::logic_error for sequences of
// different models.
RoutingWindow WindowsOf(const std::vector<const RoutingTrace*>& traces, Stack stack,
                        int source_layer, int num_experts, int experts_per_token = 1,
                        bool router_inputs = true);
// Adds the router's likeliest experts at the source layer where all of the window's
// sequences, which `traces` are, have them with their probabilities. As WindowsOf.
void AddGates(const std::vector<const RoutingTrace*>& traces, RoutingWindow* window);
// Of one sequence (B = 1).
RoutingWindow WindowOf(const RoutingTrace& trace, Stack stack, int source_layer,
                       int num_experts, int experts_per_token = 1);

// A decoder's window without its first `count` tokens, whose newest one it still knows as
// the token before. Views.
RoutingWindow WithoutTokens(const RoutingWindow& window, int64_t count);

// The decoder's output states of a recorded sequence, [1,T,D] float32; undefined where
// none were recorded.
at::Tensor OutputOf(const RoutingTrace& trace);

}  // namespace routecast
