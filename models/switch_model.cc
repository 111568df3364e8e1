#include "models/switch_model.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <bit>
#include <cmath>

#include "common/errors.h"
#include "common/random.h"
#include "models/attention.h"
#include "models/expert_stack.h"
#include "models/host_copy.h"
#include "models/linear.h"
#include "models/relative_position.h"
#include "models/rms_norm.h"
#include "models/switch_math.h"
#include "models/token_groups.h"
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

at::Tensor Counted(const at::Tensor& valid_BT, at::Device device,
                   const ForwardOptions& options) {
  return options.ignore_padding ? valid_BT.to(device) : at::Tensor();
}

// Puts `added` behind the `past` positions of a DecoderCache's tensor, in place where
// there is room; returns all of them.
at::Tensor Appended(at::Tensor* kept, const at::Tensor& added, int64_t past,
                    int64_t most) {
  const int64_t length = past + added.size(2);
  if (past == 0 || kept->size(2) < length) {
    const at::Tensor known = past > 0 ? kept->narrow(2, 0, past) : at::Tensor();
    if (most <= length) {
      return *kept = past > 0 ? at::cat({known, added}, 2) : added;
    }
    std::vector<int64_t> shape = added.sizes().vec();
    shape[2] = std::min(2 * length, most);
    *kept = at::empty(shape, added.options());
    if (past > 0) kept->narrow(2, 0, past).copy_(known);
  }
  kept->narrow(2, past, added.size(2)).copy_(added);
  return kept->narrow(2, 0, length);
}

// Offers the weights of a block's attention to an observer that wants them.
class AttentionReport {
 public:
  AttentionReport(int moe_layer, RoutingObserver* observer)
      : layer_(moe_layer),
        observer_(moe_layer >= 0 && observer != nullptr && observer->WantsAttention()
                      ? observer
                      : nullptr) {}
  // Where Attend is to leave them; null where nobody asks.
  at::Tensor* weights() { return observer_ != nullptr ? &weights_ : nullptr; }
  void Tell(bool cross) {
    if (observer_ != nullptr) observer_->OnAttention({layer_, cross, weights_});
  }

 private:
  int layer_;
  RoutingObserver* observer_;
  at::Tensor weights_;
};

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
uint64_t KeyValueBytes(const SwitchConfig& config, at::ScalarType dtype, int64_t batch,
                       int64_t source, int64_t target) {
  const int64_t token = batch * config.num_heads * config.d_kv *
                        static_cast<int64_t>(at::elementSize(dtype));  // keys or values
  const int64_t held = 2 * int64_t{config.num_decoder_layers} * (source + target);
  return static_cast<uint64_t>(token * (held + target));
}

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
                               const at::Tensor& v, const at::Tensor& bias, bool causal,
                               const at::Tensor& o, at::Tensor* seen_weights,
                               const at::Tensor& mask) const {
  return Linear(MultiHeadAttention(q, k, v, bias, causal, seen_weights, mask), o);
}

// Computed on the CPU whatever the device: at a bucket's border the logarithm's last bit
// decides.
const at::Tensor& SwitchModel::Buckets(Stack stack, int64_t reach) const {
  at::Tensor& table = buckets_[static_cast<size_t>(stack)];
  if (table.defined() && table.size(0) > 2 * reach) return table;
  const auto longest = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(reach)));
  table = RelativeBuckets(at::arange(-longest, longest + 1, at::kLong),
                          /*bidirectional=*/stack == Stack::kEncoder,
                          config_.relative_attention_num_buckets,
                          config_.relative_attention_max_distance)
              .to(device());
  return table;
}

at::Tensor SwitchModel::PositionBias(Stack stack, int64_t queries, int64_t keys,
                                     int64_t past) const {
  const bool causal = stack == Stack::kDecoder;
  const at::Tensor& table = (causal ? decoder_ : encoder_).relative_bias;
  const at::Tensor& buckets = Buckets(stack, std::max(keys, past + queries));
  const auto options = at::TensorOptions(at::kLong).device(device());
  const at::Tensor distance = at::arange(keys, options).unsqueeze(0) -
                              at::arange(past, past + queries, options).unsqueeze(1);
  at::Tensor bias = at::embedding(table, buckets.take(distance + buckets.size(0) / 2))
                        .permute({2, 0, 1})
                        .contiguous()  // once, not once a block
                        .unsqueeze(0);
  // A last query sees every key: there is nothing to hide from it.
  if (causal && queries > 1) {
    bias = bias.masked_fill(distance > 0, LowestOf(table.scalar_type()));
  }
  return bias;
}

at::Tensor SwitchModel::Encode(const at::Tensor& ids_BS, const at::Tensor& valid_BS,
                               const ForwardOptions& options) {
  const PassInfo pass{Stack::kEncoder, ids_BS, valid_BS, 0};
  if (options.observer) options.observer->OnPassBegin(pass);
  at::Tensor hidden = at::embedding(encoder_.embedding, ids_BS.to(device()));
  const int64_t length = ids_BS.size(1);
  at::Tensor bias = PositionBias(Stack::kEncoder, length, length, 0);
  at::Tensor mask = KeyMask(valid_BS.to(device()), hidden);
  if (!OwnAttentionServes(hidden, length, config_.d_kv)) {
    bias = bias + mask;  // once, not once a block
    mask.reset();
  }
  const at::Tensor counted = Counted(valid_BS, device(), options);
  for (const Block& block : encoder_.blocks) {
    const at::Tensor x = Norm(hidden, block.self.norm);
    AttentionReport report(block.moe_layer, options.observer);
    hidden = Clamped(hidden + Attend(Heads(x, block.self.q), Heads(x, block.self.k),
                                     Heads(x, block.self.v), bias, /*causal=*/false,
                                     block.self.o, report.weights(), mask));
    report.Tell(/*cross=*/false);
    hidden = AddFeedForward(block, hidden, counted, options);
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
  const at::Tensor bias = PositionBias(Stack::kDecoder, length, past + length, past);
  const at::Tensor cross_bias = past > 0 && cache->cross_bias.defined()
                                    ? cache->cross_bias
                                    : KeyMask(encoder_valid_BS.to(device()), hidden);
  if (cache) cache->cross_bias = cross_bias;
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
      k = Appended(&cache->self_key[i], k, past, cache->most);
      v = Appended(&cache->self_value[i], v, past, cache->most);
    }
    AttentionReport report(block.moe_layer, options.observer);
    hidden = Clamped(hidden + Attend(Heads(x, block.self.q), k, v, bias, /*causal=*/true,
                                     block.self.o, report.weights()));
    report.Tell(/*cross=*/false);

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
    hidden =
        Clamped(hidden + Attend(Heads(x, block.cross.q), cross_k, cross_v, cross_bias,
                                /*causal=*/false, block.cross.o, report.weights()));
    report.Tell(/*cross=*/true);
    hidden = AddFeedForward(block, hidden, counted, options);
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

at::Tensor SwitchModel::AddFeedForward(const Block& block, const at::Tensor& hidden_BTD,
                                       const at::Tensor& counted_BT,
                                       const ForwardOptions& options) {
  const at::Tensor normed = Norm(hidden_BTD, block.ff_norm);
  if (block.moe_layer >= 0) {
    return Clamped(AddSparse(block, hidden_BTD, normed, counted_BT, options));
  }
  return Clamped(hidden_BTD + ApplyFeedForward(config_.activation, block.dense, normed));
}

LayerRouting SwitchModel::Route(const Block& block, const at::Tensor& normed_BTD,
                                const at::Tensor& counted_BT,
                                const ForwardOptions& options) const {
  at::Tensor router_input = normed_BTD.to(router_type_);
  if (options.jitter > 0) {
    router_input =
        Jitter(router_input, options.jitter,
               Mix(options.jitter_key, static_cast<uint64_t>(block.moe_layer)));
  }
  const Top1Choice choice = ChooseTop1(router_input, block.router_weight,
                                       block.router_bias, normed_BTD.scalar_type());
  LayerRouting routing;
  routing.layer = block.moe_layer;
  routing.input_BTD = normed_BTD;
  routing.logits_BTE = choice.logits_BTE;
  routing.expert_ids_BT = choice.expert_ids_BT;
  routing.gate_probs_BT = choice.gate_probs_BT;
  routing.margins_BT = choice.margins_BT;
  if (options.routing_override) {
    options.routing_override->Replace(block.moe_layer, &routing.expert_ids_BT,
                                      &routing.gate_probs_BT);
    const at::Tensor& ids = routing.expert_ids_BT;
    at::_assert_async(ids.ge(0).logical_and(ids.lt(config_.num_experts)).all(),
                      "a routing override chose an expert that is not there");
  }
  routing.dropped_BT = DroppedByCapacity(routing.expert_ids_BT, config_.num_experts,
                                         config_.expert_capacity, counted_BT);
  return routing;
}

at::Tensor SwitchModel::AddSparse(const Block& block, const at::Tensor& hidden_BTD,
                                  const at::Tensor& normed_BTD,
                                  const at::Tensor& counted_BT,
                                  const ForwardOptions& options) {
  const LayerRouting routing = Route(block, normed_BTD, counted_BT, options);
  const bool may_drop =
      counted_BT.defined() || normed_BTD.size(1) > config_.expert_capacity;
  const TokenGroups groups = GroupByExpert(
      routing.expert_ids_BT.reshape({-1}),
      may_drop ? routing.dropped_BT.reshape({-1}) : at::Tensor(), config_.num_experts);
  const ExpertStack* stack = executor_->Stacked(block.moe_layer);
  HostCopy offsets = stack ? HostCopy() : HostCopy(groups.offsets_E1);
  if (options.observer) options.observer->OnRouting(routing);
  // Queued before the wait for the offsets: the rows are there when the first product is.
  const at::Tensor rows = GatherRows(normed_BTD.reshape({-1, config_.d_model}), groups);
  if (stack) {
    return AddScattered(
               hidden_BTD.reshape({-1, config_.d_model}),
               GroupedFeedForward(config_.activation, *stack, rows, groups.offsets_E1),
               routing.gate_probs_BT.reshape({-1}), groups)
        .view_as(hidden_BTD);
  }
  const std::span<const int64_t> ends(offsets.Wait().const_data_ptr<int64_t>(),
                                      static_cast<size_t>(config_.num_experts) + 1);
  // A dropped token contributes zero: the residual alone carries it.
  if (ends.back() == 0) return hidden_BTD;
  return AddScattered(hidden_BTD.reshape({-1, config_.d_model}),
                      executor_->RunSorted(block.moe_layer, rows, ends),
                      routing.gate_probs_BT.reshape({-1}), groups)
      .view_as(hidden_BTD);
}

}  // namespace routecast
