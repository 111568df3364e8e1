// Configuration of a Switch Transformer, as in Hugging Face's config.json
// (model_type switch_transformers; transformers 5.23.0 is the reference).
#pragma once

#include <string>

#include "common/routing.h"
#include "common/run_record.h"

namespace routecast {

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
  int num_experts = 8;
  int expert_capacity = 64;  // tokens of one sequence that one expert takes
  bool router_bias = false;
  double router_jitter_noise = 0.01;  // training only
  double router_z_loss_coef = 0.001;
  double router_aux_loss_coef = 0.001;
  int relative_attention_num_buckets = 32;
  int relative_attention_max_distance = 128;
  double layer_norm_epsilon = 1e-6;
  bool tie_word_embeddings = true;
  int pad_token_id = 0;
  int eos_token_id = 1;
  int decoder_start_token_id = 0;

  // Block i holds experts when i % step == 1, or step == 1; step = blocks / sparse
  // layers.
  bool IsSparse(Stack stack, int block) const;
  int blocks(Stack stack) const {
    return stack == Stack::kEncoder ? num_layers : num_decoder_layers;
  }
  MoeGeometry geometry() const;

  // Throws DataError naming `what`, the key and the value: unknown model type, an
  // activation other than relu, sizes out of range.
  static SwitchConfig FromJson(const Json& json, const std::string& what);
  Json ToJson() const;  // loads in transformers
};

}  // namespace routecast
