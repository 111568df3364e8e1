#include "models/static_decoder.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <stdexcept>

#include "models/expert_gemv.h"
#include "models/switch_math.h"
#include "models/token_groups.h"

namespace routecast {
namespace {

// Each row reads its expert's weights: beyond this, products of sorted rows read less.
constexpr int64_t kMostRows = 32;

}  // namespace

bool StaticDecoder::Serves(const SwitchModel& model, const ForwardOptions& options,
                           int64_t rows) {
  if (rows > kMostRows || options.routing_override || options.jitter > 0) return false;
  if (options.observer && options.observer->WantsAttention()) return false;
  const MoeGeometry& g = model.geometry();
  for (int l = 0; l < g.layers(Stack::kDecoder); ++l) {
    if (!model.executor_->Table(g.GlobalLayer(Stack::kDecoder, l))) return false;
  }
  return true;
}

StaticDecoder::StaticDecoder(SwitchModel* model, const at::Tensor& encoded_RSD,
                             const at::Tensor& valid_RS, int64_t num_positions,
                             const ForwardOptions& options)
    : model_(model),
      options_(options),
      rows_(encoded_RSD.size(0)),
      num_positions_(num_positions),
      graph_(model->device()) {
  const c10::NoGradGuard no_grad;
  const SwitchConfig& c = model->config();
  const auto on = at::TensorOptions().device(model->device());
  ids_R1_ = at::zeros({rows_, 1}, on.dtype(at::kLong));
  live_R1_ = at::ones({rows_, 1}, on.dtype(at::kBool));
  position_ = at::zeros({1}, on.dtype(at::kLong));
  keys_L_ = at::arange(num_positions, on.dtype(at::kLong));
  row_R_ = at::arange(rows_, on.dtype(at::kInt));
  const at::Tensor& buckets = model->Buckets(Stack::kDecoder, num_positions);
  // A key's distance is 0 or below: how far it lies back.
  distance_bias_LH_ =
      at::embedding(model->decoder_.relative_bias,
                    buckets.index_select(0, buckets.size(0) / 2 - keys_L_));
  cross_bias_ = KeyMask(valid_RS.to(model->device()), encoded_RSD);
  for (const SwitchModel::Block& block : model->decoder_.blocks) {
    const at::Tensor own =
        at::zeros({rows_, c.num_heads, num_positions, c.d_kv}, encoded_RSD.options());
    memory_.push_back({own, own.clone(), model->Heads(encoded_RSD, block.cross.k),
                       model->Heads(encoded_RSD, block.cross.v)});
  }
  logits_RV_ = at::empty({rows_, c.vocab_size}, encoded_RSD.options());
}

at::Tensor StaticDecoder::Step(const at::Tensor& ids_R1, const at::Tensor& live_R1) {
  if (steps_ == num_positions_) {
    throw std::logic_error("StaticDecoder: every position is taken");
  }
  const c10::NoGradGuard no_grad;
  PassInfo pass{Stack::kDecoder, ids_R1, live_R1, static_cast<int>(steps_++)};
  ids_R1_.copy_(ids_R1);
  live_R1_.copy_(live_R1);
  graph_.Run([this] { Compute(); });
  if (options_.observer) {
    options_.observer->OnPassBegin(pass);
    for (const LayerRouting& routing : routings_) options_.observer->OnRouting(routing);
    pass.output_BTD = output_RTD_;
    options_.observer->OnPassEnd(pass);
  }
  return logits_RV_;
}

// Into the same memory, which a graph has recorded. The cross attention's stays: rows of
// a prompt change places among themselves only.
void StaticDecoder::Reorder(const at::Tensor& source_R) {
  const c10::NoGradGuard no_grad;
  for (const Memory& m : memory_) {
    for (const at::Tensor& tensor : {m.self_key, m.self_value}) {
      tensor.copy_(tensor.index_select(0, source_R));
    }
  }
}

// [1,H,1,L]; positions that are not written yet are hidden.
at::Tensor StaticDecoder::SelfBias() const {
  const at::Tensor back = position_ - keys_L_;
  return distance_bias_LH_.index_select(0, back.clamp_min(0))
      .t()
      .masked_fill(back < 0, LowestOf(distance_bias_LH_.scalar_type()))
      .unsqueeze(0)
      .unsqueeze(2);
}

void StaticDecoder::Compute() {
  routings_.clear();
  SwitchModel& m = *model_;
  at::Tensor hidden = at::embedding(m.decoder_.embedding, ids_R1_);
  const at::Tensor bias = SelfBias();
  for (size_t i = 0; i < memory_.size(); ++i) {
    const SwitchModel::Block& block = m.decoder_.blocks[i];
    const Memory& memory = memory_[i];
    at::Tensor x = m.Norm(hidden, block.self.norm);
    memory.self_key.index_copy_(2, position_, m.Heads(x, block.self.k));
    memory.self_value.index_copy_(2, position_, m.Heads(x, block.self.v));
    hidden = Clamped(hidden + m.Attend(m.Heads(x, block.self.q), memory.self_key,
                                       memory.self_value, bias, block.self.o));
    x = m.Norm(hidden, block.cross.norm);
    hidden = Clamped(hidden + m.Attend(m.Heads(x, block.cross.q), memory.cross_key,
                                       memory.cross_value, cross_bias_, block.cross.o));
    hidden = AddFeedForward(block, hidden);
  }
  output_RTD_ = m.Norm(hidden, m.decoder_.final_norm);
  logits_RV_.copy_(m.Logits(output_RTD_.select(1, 0)));
  position_.add_(1);
}

at::Tensor StaticDecoder::AddFeedForward(const SwitchModel::Block& block,
                                         const at::Tensor& hidden) {
  const at::Tensor normed = model_->Norm(hidden, block.ff_norm);
  if (block.moe_layer >= 0) return Clamped(AddSparse(block, hidden, normed));
  return Clamped(hidden +
                 ApplyFeedForward(model_->config().activation, block.dense, normed));
}

at::Tensor StaticDecoder::AddSparse(const SwitchModel::Block& block,
                                    const at::Tensor& hidden, const at::Tensor& normed) {
  const SwitchConfig& c = model_->config();
  const at::Tensor counted = options_.ignore_padding ? live_R1_ : at::Tensor();
  const LayerRouting routing = model_->Route(block, normed, counted, {});
  if (options_.observer) routings_.push_back(routing);
  // One token a sequence: dropped where there is no capacity at all, or not counted.
  const bool may_drop = counted.defined() || c.expert_capacity < 1;
  TokenGroups places;
  places.place_N =
      may_drop ? row_R_.masked_fill(routing.dropped_BT.reshape({-1}), -1) : row_R_;
  const at::Tensor outputs =
      ExpertGemv(c.activation, *model_->executor_->Table(block.moe_layer),
                 normed.reshape({rows_, -1}), routing.expert_ids_BT.reshape({-1}));
  return AddScattered(hidden.reshape({rows_, -1}), outputs,
                      routing.gate_probs_BT.reshape({-1}), places)
      .view_as(hidden);
}

}  // namespace routecast
