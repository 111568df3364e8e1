// The Switch Transformer: encoder and decoder, T5 details exact, top-1 routing with
// per-sequence capacity. Reference: transformers 5.23.0 (modeling_switch_transformers);
// docs/switch_transformer.md says where behaviour is decided. Shape letters: B sequences,
// S source tokens, T target tokens, D model width, E experts, V vocabulary, H heads.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "models/expert_execution.h"
#include "models/parameters.h"
#include "models/routing_observer.h"
#include "models/switch_config.h"

namespace routecast {

// Replaces the router's choice: random routing as a control, forced routing in a replay.
class RoutingOverride {
 public:
  virtual ~RoutingOverride() = default;
  // May replace expert_ids_BT (int64) and gate_probs_BT, both of the shapes given.
  virtual void Replace(int layer, at::Tensor* expert_ids_BT,
                       at::Tensor* gate_probs_BT) = 0;
};

// What a forward pass may do beside computing. All pointers are borrowed and may be null.
struct ForwardOptions {
  RoutingObserver* observer = nullptr;
  RoutingOverride* routing_override = nullptr;
  // Training: the router's input is multiplied by uniform noise in [1-jitter, 1+jitter],
  // a function of jitter_key, stack and layer only. 0 = off.
  double jitter = 0;
  uint64_t jitter_key = 0;
  // Not the reference's: padding is routed to no expert and spends no capacity; observers
  // see it as dropped. Off, padding is routed like any token.
  bool ignore_padding = false;
};

// Keys and values of incremental decoding. Owned by the caller, one a batch.
struct DecoderCache {
  // Per block [B,H,room,d_kv]: `length` positions, then any numbers up to `room`.
  std::vector<at::Tensor> self_key, self_value;
  std::vector<at::Tensor> cross_key,
      cross_value;        // per block [B,H,S,d_kv], computed once
  at::Tensor cross_bias;  // of the source's padding, computed once
  int length = 0;
  // Given where it is known how long it may get: the room then doubles, up to this, when
  // it is full. Else there is none beyond `length`, and each step copies all of it.
  int most = 0;
};

// Bytes of a DecoderCache of `batch` sequences with `source` and `target` tokens, and of
// what replaces one of its tensors while the last token is added.
uint64_t KeyValueBytes(const SwitchConfig& config, at::ScalarType dtype, int64_t batch,
                       int64_t source, int64_t target);

// Thread rule: one thread at a time. Keeps references to the parameters; the executor is
// borrowed and must outlive the model. Gradients flow where the parameters require them.
class SwitchModel {
 public:
  // `parameters` holds everything but, where the executor brings them, the experts.
  // Throws DataError where a tensor is missing or has the wrong shape, std::logic_error
  // where the executor has another activation than the configuration.
  SwitchModel(SwitchConfig config, const Parameters& parameters,
              ExpertExecutor* executor);
  ~SwitchModel();

  const SwitchConfig& config() const { return config_; }
  const MoeGeometry& geometry() const { return geometry_; }
  at::Device device() const;
  at::ScalarType dtype() const;
  at::ScalarType router_type() const { return router_type_; }

  // ids int64 and valid bool [B,S] on the CPU -> hidden [B,S,D] (after the final norm).
  at::Tensor Encode(const at::Tensor& ids_BS, const at::Tensor& valid_BS,
                    const ForwardOptions& options = {});
  // Teacher forcing (cache null) or one incremental call (cache grows by T). decoder ids
  // [B,T] on the CPU; decoder_valid [B,T] bool is what observers see, causality hides
  // padding. Returns hidden [B,T,D] after the final norm.
  at::Tensor Decode(const at::Tensor& decoder_ids_BT, const at::Tensor& decoder_valid_BT,
                    const at::Tensor& encoder_hidden_BSD,
                    const at::Tensor& encoder_valid_BS, DecoderCache* cache,
                    const ForwardOptions& options = {});
  // Vocabulary logits [..., V]; scaled by d_model^-0.5 where embeddings are tied.
  at::Tensor Logits(const at::Tensor& decoder_hidden) const;

 private:
  friend class StaticDecoder;  // the same layers over other memory
  struct Attention {
    at::Tensor q, k, v, o, norm;
  };
  struct Block {
    Attention self, cross;  // cross in the decoder only
    at::Tensor ff_norm;
    ExpertWeights dense;                    // dense blocks
    at::Tensor router_weight, router_bias;  // sparse blocks; in the router's dtype
    int moe_layer = -1;                     // global, -1 = dense
  };
  struct StackWeights {
    at::Tensor embedding;  // [V,D]; both stacks share one where embeddings are tied
    std::vector<Block> blocks;
    at::Tensor relative_bias;  // [buckets, H]
    at::Tensor final_norm;
  };

  StackWeights LoadStack(Stack stack, const Parameters& parameters) const;
  at::Tensor Norm(const at::Tensor& x, const at::Tensor& weight) const;
  at::Tensor Heads(const at::Tensor& x, const at::Tensor& weight) const;
  at::Tensor Attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const at::Tensor& bias, bool causal, const at::Tensor& o,
                    at::Tensor* seen_weights = nullptr,
                    const at::Tensor& mask = {}) const;
  at::Tensor PositionBias(Stack stack, int64_t queries, int64_t keys, int64_t past) const;
  // The buckets of distances (key minus query) -reach..reach, on the device.
  const at::Tensor& Buckets(Stack stack, int64_t reach) const;
  // `counted_BT`: the tokens that are routed; undefined = all.
  // The residual and the block's feed-forward layer.
  at::Tensor AddFeedForward(const Block& block, const at::Tensor& hidden_BTD,
                            const at::Tensor& counted_BT, const ForwardOptions& options);
  LayerRouting Route(const Block& block, const at::Tensor& normed_BTD,
                     const at::Tensor& counted_BT, const ForwardOptions& options) const;
  at::Tensor AddSparse(const Block& block, const at::Tensor& hidden_BTD,
                       const at::Tensor& normed_BTD, const at::Tensor& counted_BT,
                       const ForwardOptions& options);
  void LoadRouter(const std::string& layer, const Parameters& parameters,
                  Block* block) const;
  void LoadDense(const std::string& layer, const Parameters& parameters,
                 Block* block) const;

  SwitchConfig config_;
  MoeGeometry geometry_;
  at::ScalarType router_type_;
  ExpertExecutor* executor_;
  at::Tensor lm_head_;
  StackWeights encoder_, decoder_;
  mutable at::Tensor buckets_[2];  // by stack; grows with the longest sequence
};

// The shapes of a configuration's parameters in checkpoint order: name -> shape.
std::vector<std::pair<std::string, std::vector<int64_t>>> ParameterShapes(
    const SwitchConfig& config);

}  // namespace routecast
