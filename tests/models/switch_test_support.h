// What tests of the Switch Transformer share: a log of routing and small seeded models.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "models/checkpoint.h"

namespace routecast {

// Keeps every routing decision and pass it is offered.
class RoutingLog : public RoutingObserver {
 public:
  void OnPassBegin(const PassInfo& pass) override { passes.push_back(pass); }
  void OnRouting(const LayerRouting& routing) override { routings.push_back(routing); }
  void OnPassEnd(const PassInfo&) override {}
  std::vector<PassInfo> passes;
  std::vector<LayerRouting> routings;
};

inline SwitchConfig SmallConfig() {
  SwitchConfig c;
  c.vocab_size = 96;
  c.d_model = 32;
  c.d_kv = 8;
  c.d_ff = 48;
  c.num_heads = 4;
  c.num_layers = c.num_decoder_layers = 4;
  c.num_sparse_encoder_layers = c.num_sparse_decoder_layers = 2;
  c.num_experts = 8;
  c.tie_word_embeddings = false;
  return c;
}

// Seeded weights large enough that routing varies.
inline Checkpoint RandomCheckpoint(const SwitchConfig& config, uint64_t seed) {
  at::manual_seed(seed);
  Checkpoint checkpoint;
  checkpoint.config = config;
  for (const auto& [name, shape] : ParameterShapes(config)) {
    const bool gain = name.find("layer_norm") != std::string::npos;
    const double scale = name.find("shared") != std::string::npos ||
                                 name.find("router") != std::string::npos
                             ? 1.0
                             : 0.3;
    checkpoint.parameters.Add(
        name, gain ? at::ones(shape) + 0.2 * at::randn(shape) : scale * at::randn(shape));
  }
  return checkpoint;
}

}  // namespace routecast
