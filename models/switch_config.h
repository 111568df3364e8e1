// Configuration of a Switch Transformer, as in Hugging Face's config.json
// (model_type switch_transformers; transformers 5.23.0 is the reference).
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "common/routing.h"
#include "common/run_record.h"
#include "models/activation.h"

namespace routecast {

// What routers compute in; their result is in the model's dtype again.
enum class RouterDtype : uint8_t { kFloat32, kFloat16, kBFloat16 };

struct SwitchConfig {
  int vocab_size = 32128;
  int d_model = 768;
  int d_kv = 64;
  int d_ff = 2048;
  int num_heads = 12;
  int num_layers = 12;          // encoder blocks
  int num_decoder_layers = 12;  // decoder blocks
  int num_sparse_encoder_layers = 3;
  int num_sparse_decoder_layers = 3;
  // Where set they place the experts, whatever the two counts above say.
  std::optional<int> encoder_sparse_step, decoder_sparse_step;
  int num_experts = 8;
  int expert_capacity = 64;  // tokens of one sequence that one expert takes; 0 = none
  bool router_bias = false;
  RouterDtype router_dtype = RouterDtype::kFloat32;
  // Kept for the file's sake: the reference stores it and routes padding all the same.
  // What it says is done by ForwardOptions::ignore_padding.
  bool router_ignore_padding_tokens = false;
  double router_jitter_noise = 0.01;  // training only
  double router_z_loss_coef = 0.001;
  double router_aux_loss_coef = 0.001;
  int relative_attention_num_buckets = 32;
  int relative_attention_max_distance = 128;
  Activation activation = Activation::kRelu;  // dense_act_fn: dense blocks and experts
  // Ours alone, off by default: dense blocks and experts are T5 1.1's gated ones (wi_0,
  // wi_1, wo). The reference ignores the key.
  bool is_gated_act = false;
  double layer_norm_epsilon = 1e-6;
  bool tie_word_embeddings = true;
  int pad_token_id = 0;
  int eos_token_id = 1;
  int decoder_start_token_id = 0;

  // Blocks between experts: the *_sparse_step where set, else blocks / sparse layers
  // (all blocks where that count is 0, which still makes block 1 sparse, as the
  // reference's does).
  int SparseStep(Stack stack) const;
  // Block i holds experts when i % step == 1, or step == 1; none where step is 0.
  bool IsSparse(Stack stack, int block) const;
  int blocks(Stack stack) const {
    return stack == Stack::kEncoder ? num_layers : num_decoder_layers;
  }
  MoeGeometry geometry() const;

  // Throws DataError naming `what`, the key and the value: unknown model type, activation
  // or router dtype, sizes out of range, a feed_forward_proj (which the reference does
  // not read) that contradicts dense_act_fn and is_gated_act.
  static SwitchConfig FromJson(const Json& json, const std::string& what);
  Json ToJson() const;  // loads in transformers
};

}  // namespace routecast
