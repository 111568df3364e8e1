#include "models/switch_model.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <cmath>
#include <limits>

#include "common/errors.h"
#include "common/random.h"
#include "models/linear.h"
#include "models/relative_position.h"
#include "models/rms_norm.h"
#include "models/top1_router.h"

namespace routecast {
namespace {

std::string BlockName(Stack stack, int block) {
  return std::string(StackName(stack)) + ".block." + std::to_string(block) + ".layer.";
}

const at::Tensor& Checked(const Parameters& parameters, const std::string& name,
                          at::IntArrayRef shape) {
  const at::Tensor& tensor = parameters.Get(name);
  if (tensor.sizes() != shape) {
    std::string found, expected;
    for (int64_t d : tensor.sizes()) found += std::to_string(d) + " ";
    for (int64_t d : shape) expected += std::to_string(d) + " ";
    throw DataError(
        ErrorText("tensor " + name + " has the wrong shape",
                  "found [ " + found + "], config.json says [ " + expected + "]",
                  "does config.json belong to these weights?"));
  }
  return tensor;
}

double LowestOf(at::ScalarType type) {
  if (type == at::kHalf) return -65504.0;
  if (type == at::kBFloat16) return -3.3895313892515355e38;
  return std::numeric_limits<float>::lowest();
}

// Additive mask [B,1,1,S]: 0 where valid, the dtype's lowest number elsewhere.
at::Tensor KeyMask(const at::Tensor& valid_BS, const at::Tensor& like) {
  return ((1.0 - valid_BS.to(like.options())) * LowestOf(like.scalar_type()))
      .unsqueeze(1)
      .unsqueeze(1);
}

at::Tensor Jitter(const at::Tensor& x, double jitter, uint64_t key) {
  at::Generator generator = at::detail::createCPUGenerator(key);
  const at::Tensor noise = at::empty(x.sizes(), at::kFloat)
                               .uniform_(1.0 - jitter, 1.0 + jitter, generator)
                               .to(x.device(), x.scalar_type());
  return x * noise;
}

at::ScalarType TypeOf(RouterDtype dtype) {
  constexpr at::ScalarType kTypes[] = {at::kFloat, at::kHalf, at::kBFloat16};
  return kTypes[static_cast<size_t>(dtype)];
}

// The reference's guard of fp16 after each residual: infinities become large numbers.
at::Tensor Clamped(const at::Tensor& x) {
  if (x.scalar_type() != at::kHalf) return x;
  constexpr double kMax = 65504.0;
  const double limit = at::isinf(x).any().item<bool>() ? kMax - 1000 : kMax;
  return at::clamp(x, -limit, limit);
}

at::Tensor Counted(const at::Tensor& valid_BT, at::Device device,
                   const ForwardOptions& options) {
  return options.ignore_padding ? valid_BT.to(device) : at::Tensor();
}

}  // namespace

SwitchModel::SwitchModel(SwitchConfig config, const Parameters& parameters,
                         ExpertExecutor* executor)
    : config_(std::move(config)),
      geometry_(config_.geometry()),
      router_type_(TypeOf(config_.router_dtype)),
      executor_(executor) {
  if (executor_->activation() != config_.activation) {
    throw std::logic_error("the executor's activation is " +
                           ActivationName(executor_->activation()) + ", the model's " +
                           ActivationName(config_.activation));
  }
  lm_head_ = Checked(parameters,
                     config_.tie_word_embeddings ? "shared.weight" : "lm_head.weight",
                     {config_.vocab_size, config_.d_model});
  encoder_ = LoadStack(Stack::kEncoder, parameters);
  decoder_ = LoadStack(Stack::kDecoder, parameters);
}

SwitchModel::~SwitchModel() = default;

at::Device SwitchModel::device() const { return lm_head_.device(); }
at::ScalarType SwitchModel::dtype() const { return lm_head_.scalar_type(); }

SwitchModel::StackWeights SwitchModel::LoadStack(Stack stack,
                                                 const Parameters& parameters) const {
  const int64_t d = config_.d_model, inner = int64_t{config_.num_heads} * config_.d_kv;
  const auto attention = [&](const std::string& at_layer, const std::string& kind) {
    const std::string name = at_layer + kind + ".";
    return Attention{Checked(parameters, name + "q.weight", {inner, d}),
                     Checked(parameters, name + "k.weight", {inner, d}),
                     Checked(parameters, name + "v.weight", {inner, d}),
                     Checked(parameters, name + "o.weight", {d, inner}),
                     Checked(parameters, at_layer + "layer_norm.weight", {d})};
  };
  StackWeights weights;
  // transformers 5 unties the stacks' embeddings together with the head.
  const std::string own = std::string(StackName(stack)) + ".embed_tokens.weight";
  weights.embedding =
      Checked(parameters,
              !config_.tie_word_embeddings && parameters.Has(own) ? own : "shared.weight",
              {config_.vocab_size, d});
  int moe_layer = geometry_.GlobalLayer(stack, 0);
  for (int i = 0; i < config_.blocks(stack); ++i) {
    const std::string base = BlockName(stack, i);
    Block block;
    block.self = attention(base + "0.", "SelfAttention");
    if (stack == Stack::kDecoder) block.cross = attention(base + "1.", "EncDecAttention");
    const std::string ff = base + (stack == Stack::kEncoder ? "1." : "2.");
    block.ff_norm = Checked(parameters, ff + "layer_norm.weight", {d});
    if (config_.IsSparse(stack, i)) {
      block.moe_layer = moe_layer++;
      LoadRouter(ff, parameters, &block);
    } else {
      LoadDense(ff, parameters, &block);
    }
    weights.blocks.push_back(std::move(block));
  }
  weights.relative_bias = Checked(
      parameters, BlockName(stack, 0) + "0.SelfAttention.relative_attention_bias.weight",
      {config_.relative_attention_num_buckets, config_.num_heads});
  weights.final_norm = Checked(
      parameters, std::string(StackName(stack)) + ".final_layer_norm.weight", {d});
  return weights;
}

void SwitchModel::LoadRouter(const std::string& layer, const Parameters& parameters,
                             Block* block) const {
  const std::string name = layer + "mlp.router.classifier.";
  block->router_weight =
      Checked(parameters, name + "weight", {config_.num_experts, config_.d_model})
          .to(router_type_);
  if (config_.router_bias) {
    block->router_bias =
        Checked(parameters, name + "bias", {config_.num_experts}).to(router_type_);
  }
}

void SwitchModel::LoadDense(const std::string& layer, const Parameters& parameters,
                            Block* block) const {
  const int64_t d = config_.d_model, f = config_.d_ff;
  const std::string wi = layer + (config_.is_gated_act ? "mlp.wi_0" : "mlp.wi");
  block->dense.wi_FD = Checked(parameters, wi + ".weight", {f, d});
  block->dense.wo_DF = Checked(parameters, layer + "mlp.wo.weight", {d, f});
  if (config_.is_gated_act) {
    block->dense.gate_FD = Checked(parameters, layer + "mlp.wi_1.weight", {f, d});
  }
}

at::Tensor SwitchModel::Norm(const at::Tensor& x, const at::Tensor& weight) const {
  return RmsNorm(x, weight, config_.layer_norm_epsilon);
}

at::Tensor SwitchModel::Heads(const at::Tensor& x, const at::Tensor& weight) const {
  return Linear(x, weight)
      .view({x.size(0), x.size(1), config_.num_heads, config_.d_kv})
      .transpose(1, 2);
}

at::Tensor SwitchModel::Attend(const at::Tensor& q, const at::Tensor& k,
                               const at::Tensor& v, const at::Tensor& bias,
                               const at::Tensor& o) const {
  // No scaling of the product: T5 folds it into the initialisation.
  const at::Tensor weights = at::softmax(at::matmul(q, k.transpose(2, 3)) + bias, -1);
  const at::Tensor out =
      at::matmul(weights, v)
          .transpose(1, 2)
          .reshape({q.size(0), q.size(2), int64_t{config_.num_heads} * config_.d_kv});
  return Linear(out, o);
}

at::Tensor SwitchModel::PositionBias(const at::Tensor& table, int64_t queries,
                                     int64_t keys, int64_t past,
                                     bool bidirectional) const {
  const at::Tensor query = at::arange(queries, at::kLong).unsqueeze(1) + past;
  const at::Tensor key = at::arange(keys, at::kLong).unsqueeze(0);
  const at::Tensor buckets =
      RelativeBuckets(key - query, bidirectional, config_.relative_attention_num_buckets,
                      config_.relative_attention_max_distance);
  at::Tensor bias =
      at::embedding(table, buckets.to(table.device())).permute({2, 0, 1}).unsqueeze(0);
  if (!bidirectional) {
    const at::Tensor future = (key > query).to(table.device());
    bias = bias.masked_fill(future, LowestOf(table.scalar_type()));
  }
  return bias;
}

at::Tensor SwitchModel::Encode(const at::Tensor& ids_BS, const at::Tensor& valid_BS,
                               const ForwardOptions& options) {
  const PassInfo pass{Stack::kEncoder, ids_BS, valid_BS, 0};
  if (options.observer) options.observer->OnPassBegin(pass);
  at::Tensor hidden = at::embedding(encoder_.embedding, ids_BS.to(device()));
  const at::Tensor bias =
      PositionBias(encoder_.relative_bias, ids_BS.size(1), ids_BS.size(1), 0,
                   /*bidirectional=*/true) +
      KeyMask(valid_BS.to(device()), hidden);
  const at::Tensor counted = Counted(valid_BS, device(), options);
  for (const Block& block : encoder_.blocks) {
    const at::Tensor x = Norm(hidden, block.self.norm);
    hidden = Clamped(hidden + Attend(Heads(x, block.self.q), Heads(x, block.self.k),
                                     Heads(x, block.self.v), bias, block.self.o));
    hidden = Clamped(hidden + FeedForward(block, hidden, counted, options));
  }
  hidden = Norm(hidden, encoder_.final_norm);
  if (options.observer) options.observer->OnPassEnd(pass);
  return hidden;
}

at::Tensor SwitchModel::Decode(const at::Tensor& decoder_ids_BT,
                               const at::Tensor& decoder_valid_BT,
                               const at::Tensor& encoder_hidden_BSD,
                               const at::Tensor& encoder_valid_BS, DecoderCache* cache,
                               const ForwardOptions& options) {
  const int64_t past = cache ? cache->length : 0, length = decoder_ids_BT.size(1);
  PassInfo pass{Stack::kDecoder, decoder_ids_BT, decoder_valid_BT,
                static_cast<int>(past)};
  if (options.observer) options.observer->OnPassBegin(pass);
  at::Tensor hidden = at::embedding(decoder_.embedding, decoder_ids_BT.to(device()));
  const at::Tensor bias =
      PositionBias(decoder_.relative_bias, length, past + length, past,
                   /*bidirectional=*/false);
  const at::Tensor cross_bias = KeyMask(encoder_valid_BS.to(device()), hidden);
  const at::Tensor counted = Counted(decoder_valid_BT, device(), options);
  if (cache) {
    for (auto* part :
         {&cache->self_key, &cache->self_value, &cache->cross_key, &cache->cross_value}) {
      part->resize(decoder_.blocks.size());
    }
  }
  for (size_t i = 0; i < decoder_.blocks.size(); ++i) {
    const Block& block = decoder_.blocks[i];
    at::Tensor x = Norm(hidden, block.self.norm);
    at::Tensor k = Heads(x, block.self.k), v = Heads(x, block.self.v);
    if (cache) {
      if (past > 0) {
        k = at::cat({cache->self_key[i], k}, 2);
        v = at::cat({cache->self_value[i], v}, 2);
      }
      cache->self_key[i] = k;
      cache->self_value[i] = v;
    }
    hidden = Clamped(hidden + Attend(Heads(x, block.self.q), k, v, bias, block.self.o));

    x = Norm(hidden, block.cross.norm);
    at::Tensor cross_k, cross_v;
    if (cache && past > 0) {
      cross_k = cache->cross_key[i];
      cross_v = cache->cross_value[i];
    } else {
      cross_k = Heads(encoder_hidden_BSD, block.cross.k);
      cross_v = Heads(encoder_hidden_BSD, block.cross.v);
      if (cache) {
        cache->cross_key[i] = cross_k;
        cache->cross_value[i] = cross_v;
      }
    }
    hidden = Clamped(hidden + Attend(Heads(x, block.cross.q), cross_k, cross_v,
                                     cross_bias, block.cross.o));
    hidden = Clamped(hidden + FeedForward(block, hidden, counted, options));
  }
  if (cache) cache->length += static_cast<int>(length);
  hidden = Norm(hidden, decoder_.final_norm);
  pass.output_BTD = hidden;
  if (options.observer) options.observer->OnPassEnd(pass);
  return hidden;
}

at::Tensor SwitchModel::Logits(const at::Tensor& decoder_hidden) const {
  if (!config_.tie_word_embeddings) return Linear(decoder_hidden, lm_head_);
  return Linear(decoder_hidden * std::pow(static_cast<double>(config_.d_model), -0.5),
                lm_head_);
}

at::Tensor SwitchModel::FeedForward(const Block& block, const at::Tensor& hidden_BTD,
                                    const at::Tensor& counted_BT,
                                    const ForwardOptions& options) {
  const at::Tensor normed = Norm(hidden_BTD, block.ff_norm);
  if (block.moe_layer >= 0) return Sparse(block, normed, counted_BT, options);
  return ApplyFeedForward(config_.activation, block.dense, normed);
}

at::Tensor SwitchModel::Sparse(const Block& block, const at::Tensor& normed_BTD,
                               const at::Tensor& counted_BT,
                               const ForwardOptions& options) {
  const int64_t batch = normed_BTD.size(0), length = normed_BTD.size(1);
  at::Tensor router_input = normed_BTD.to(router_type_);
  if (options.jitter > 0) {
    router_input =
        Jitter(router_input, options.jitter,
               Mix(options.jitter_key, static_cast<uint64_t>(block.moe_layer)));
  }
  LayerRouting routing;
  routing.layer = block.moe_layer;
  routing.input_BTD = normed_BTD;
  const Top1Choice choice = ChooseTop1(router_input, block.router_weight,
                                       block.router_bias, normed_BTD.scalar_type());
  routing.logits_BTE = choice.logits_BTE;
  routing.expert_ids_BT = choice.expert_ids_BT;
  routing.gate_probs_BT = choice.gate_probs_BT;
  if (options.routing_override) {
    options.routing_override->Replace(block.moe_layer, &routing.expert_ids_BT,
                                      &routing.gate_probs_BT);
  }
  const bool may_drop = counted_BT.defined() || length > config_.expert_capacity;
  routing.dropped_BT = DroppedByCapacity(routing.expert_ids_BT, config_.num_experts,
                                         config_.expert_capacity, counted_BT);
  if (options.observer) options.observer->OnRouting(routing);

  const at::Tensor tokens_ND = normed_BTD.reshape({batch * length, config_.d_model});
  const at::Tensor ids_N = routing.expert_ids_BT.reshape({-1});
  const at::Tensor gates_N = routing.gate_probs_BT.reshape({-1, 1});
  const bool drops = may_drop && routing.dropped_BT.any().item<bool>();
  if (!drops) {
    const at::Tensor out =
        executor_->Run(block.moe_layer, tokens_ND, ids_N.to(at::kCPU)) * gates_N;
    return out.to(normed_BTD.scalar_type()).view_as(normed_BTD);
  }
  // A dropped token contributes zero: the residual alone carries it.
  const at::Tensor kept =
      at::nonzero(routing.dropped_BT.reshape({-1}).logical_not()).squeeze(1);
  if (kept.numel() == 0) return at::zeros_like(normed_BTD);
  const at::Tensor out = executor_->Run(block.moe_layer, tokens_ND.index_select(0, kept),
                                        ids_N.index_select(0, kept).to(at::kCPU)) *
                         gates_N.index_select(0, kept);
  return at::zeros_like(tokens_ND)
      .index_copy(0, kept, out.to(normed_BTD.scalar_type()))
      .view_as(normed_BTD);
}

}  // namespace routecast
