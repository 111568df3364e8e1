#include "models/static_decoder.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <stdexcept>

#include "models/expert_gemv.h"
#include "models/host_copy.h"
#include "models/switch_math.h"
#include "models/token_groups.h"
#include "models/top1_router.h"

namespace routecast {
namespace {

// Each row reads its expert's weights: beyond this, products of sorted rows read less.
constexpr int64_t kMostRows = 32;

// `experts_R` without those that are not among `leases`.
at::Tensor Among(const std::vector<ExpertLease>& leases, const at::Tensor& experts_R) {
  at::Tensor kept = experts_R.clone();
  int64_t* ids = kept.mutable_data_ptr<int64_t>();
  std::replace_if(
      ids, ids + kept.numel(),
      [&](int64_t id) {
        return std::ranges::none_of(leases,
                                    [&](const auto& l) { return l.expert() == id; });
      },
      int64_t{-1});
  return kept;
}

}  // namespace

bool StaticDecoder::HasTables(const SwitchModel& model) {
  const MoeGeometry& g = model.geometry();
  for (int l = 0; l < g.layers(Stack::kDecoder); ++l) {
    if (!model.executor_->Table(g.GlobalLayer(Stack::kDecoder, l))) return false;
  }
  return true;
}

bool StaticDecoder::Serves(const SwitchModel& model, const ForwardOptions& options,
                           int64_t rows) {
  if (rows > kMostRows || options.jitter > 0) return false;
  if (options.observer && options.observer->WantsAttention()) return false;
  if (HasTables(model)) return !options.routing_override;
  return model.executor_->Source() != nullptr;
}

StaticDecoder::StaticDecoder(SwitchModel* model, int64_t rows, int64_t num_source,
                             int64_t num_positions, const ForwardOptions& options)
    : model_(model),
      source_(HasTables(*model) ? nullptr : model->executor_->Source()),
      options_(options),
      rows_(rows),
      num_source_(num_source),
      num_positions_(num_positions),
      graph_(model->device(),
             source_ ? size_t(model->geometry().layers(Stack::kDecoder)) + 2 : 1) {
  const c10::NoGradGuard no_grad;
  const SwitchConfig& c = model->config();
  const auto on = at::TensorOptions().device(model->device());
  const auto numbers = on.dtype(model->dtype());
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
  cross_bias_ = at::zeros({rows_, 1, 1, num_source_}, numbers);
  const auto keys = [&](int64_t positions) {
    return at::zeros({rows_, c.num_heads, positions, c.d_kv}, numbers);
  };
  for (size_t i = 0; i < model->decoder_.blocks.size(); ++i) {
    memory_.push_back(
        {keys(num_positions), keys(num_positions), keys(num_source), keys(num_source)});
    if (model->decoder_.blocks[i].moe_layer < 0) continue;
    layers_.emplace_back();
    layers_.back().block = i;
    if (source_) {
      layers_.back().slots =
          std::make_unique<SlotTable>(c, model->dtype(), model->device());
    }
  }
  expert_outputs_RD_ = at::zeros({rows_, c.d_model}, numbers);
  logits_RV_ = at::empty({rows_, c.vocab_size}, numbers);
}

StaticDecoder::StaticDecoder(SwitchModel* model, const at::Tensor& encoded_RSD,
                             const at::Tensor& valid_RS, int64_t num_positions,
                             const ForwardOptions& options)
    : StaticDecoder(model, encoded_RSD.size(0), encoded_RSD.size(1), num_positions,
                    options) {
  Begin(encoded_RSD, valid_RS, options);
}

void StaticDecoder::Begin(const at::Tensor& encoded_RSD, const at::Tensor& valid_RS,
                          const ForwardOptions& options) {
  const int64_t length = encoded_RSD.size(1);
  if (encoded_RSD.size(0) != rows_ || length > num_source_ ||
      options.ignore_padding != options_.ignore_padding ||
      !Serves(*model_, options, rows_)) {
    throw std::logic_error("StaticDecoder: not made for such sequences");
  }
  const c10::NoGradGuard no_grad;
  options_ = options;
  steps_ = 0;
  position_.zero_();
  // A longer sequence's rest is hidden, and must be numbers.
  const at::Tensor valid =
      at::constant_pad_nd(valid_RS.to(at::kBool), {0, num_source_ - length});
  cross_bias_.copy_(KeyMask(valid.to(model_->device()), encoded_RSD));
  for (size_t i = 0; i < memory_.size(); ++i) {
    const SwitchModel::Attention& cross = model_->decoder_.blocks[i].cross;
    const Memory& m = memory_[i];
    for (const at::Tensor& tensor : {m.self_key, m.self_value}) tensor.zero_();
    for (const auto& [tensor, weight] :
         {std::pair(m.cross_key, cross.k), std::pair(m.cross_value, cross.v)}) {
      tensor.narrow(2, 0, length).copy_(model_->Heads(encoded_RSD, weight));
      tensor.narrow(2, length, num_source_ - length).zero_();
    }
  }
  ready_ = true;
}

at::Tensor StaticDecoder::Step(const at::Tensor& ids_R1, const at::Tensor& live_R1) {
  if (!ready_)
    throw std::logic_error("StaticDecoder: a step has failed, or nothing was begun");
  if (steps_ == num_positions_)
    throw std::logic_error("StaticDecoder: every position is taken");
  const c10::NoGradGuard no_grad;
  ready_ = false;  // what throws leaves a step half done
  SendTo(ids_R1_, ids_R1);
  SendTo(live_R1_, live_R1);
  PassInfo pass{Stack::kDecoder, ids_R1, live_R1, static_cast<int>(steps_++)};
  source_ ? RunParts(std::move(pass)) : RunWhole(std::move(pass));
  ready_ = true;
  return logits_RV_;
}

void StaticDecoder::RunWhole(PassInfo pass) {
  graph_.Run([this] { Compute(0); });
  if (!options_.observer) return;
  options_.observer->OnPassBegin(pass);
  for (const MoeLayer& layer : layers_) options_.observer->OnRouting(layer.routing);
  pass.output_BTD = output_R1D_;
  options_.observer->OnPassEnd(pass);
}

void StaticDecoder::RunParts(PassInfo pass) {
  if (options_.observer) options_.observer->OnPassBegin(pass);
  std::vector<ExpertLease> leases;  // of the layer whose experts the next part runs
  for (size_t l = 0; l <= layers_.size(); ++l) {
    graph_.Run([this, l] { Compute(l); }, l);
    // Given back once their use is queued: who writes into a slot of the device waits for
    // what is queued, as behind LocalExpertExecutor.
    leases.clear();
    if (l == layers_.size()) break;
    MoeLayer& layer = layers_[l];
    if (options_.routing_override) ForceChoice(&layer);
    HostCopy experts(layer.experts_R);
    if (options_.observer) options_.observer->OnRouting(layer.routing);
    leases = Lease(&layer, experts.Wait());
  }
  if (options_.observer) {
    pass.output_BTD = output_R1D_;
    options_.observer->OnPassEnd(pass);
  }
  graph_.Run([this] { RunHead(); }, layers_.size() + 1);
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

uint64_t StaticDecoder::memory_bytes() const {
  uint64_t bytes = graph_.kept_bytes();
  const auto add = [&](const at::Tensor& t) { bytes += t.nbytes(); };
  for (const Memory& m : memory_) {
    for (const at::Tensor* t :
         {&m.self_key, &m.self_value, &m.cross_key, &m.cross_value}) {
      add(*t);
    }
  }
  for (const MoeLayer& layer : layers_) {
    if (layer.slots) add(layer.slots->table().addresses_E3);
  }
  for (const at::Tensor* t :
       {&distance_bias_LH_, &cross_bias_, &expert_outputs_RD_, &logits_RV_}) {
    add(*t);
  }
  return bytes;
}

int64_t StaticDecoder::tables_sent() const {
  int64_t sent = 0;
  for (const MoeLayer& layer : layers_) {
    if (layer.slots) sent += layer.slots->num_sent();
  }
  return sent;
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

// What a part reads it replaces at its end only: one whose recording fails begins anew.
void StaticDecoder::Compute(size_t part) {
  SwitchModel& m = *model_;
  at::Tensor hidden;
  size_t i = 0, layer = part;
  if (part == 0) {
    hidden = at::embedding(m.decoder_.embedding, ids_R1_);
    self_bias_ = SelfBias();
  } else {
    hidden = AddExperts(layers_[part - 1], hidden_R1D_);
    i = layers_[part - 1].block + 1;
  }
  for (; i < memory_.size(); ++i) {
    const SwitchModel::Block& block = m.decoder_.blocks[i];
    hidden = AddAttention(i, hidden);
    const at::Tensor normed = m.Norm(hidden, block.ff_norm);
    if (block.moe_layer < 0) {
      hidden =
          Clamped(hidden + ApplyFeedForward(m.config().activation, block.dense, normed));
      continue;
    }
    Choose(&layers_[layer], normed);
    if (source_) {
      hidden_R1D_ = hidden;
      return;
    }
    hidden = AddExperts(layers_[layer++], hidden);
  }
  output_R1D_ = m.Norm(hidden, m.decoder_.final_norm);
  if (!source_) RunHead();
}

void StaticDecoder::RunHead() {
  logits_RV_.copy_(model_->Logits(output_R1D_.select(1, 0)));
  position_.add_(1);
}

at::Tensor StaticDecoder::AddAttention(size_t i, at::Tensor hidden) const {
  const SwitchModel& m = *model_;
  const SwitchModel::Block& block = m.decoder_.blocks[i];
  const Memory& memory = memory_[i];
  at::Tensor x = m.Norm(hidden, block.self.norm);
  memory.self_key.index_copy_(2, position_, m.Heads(x, block.self.k));
  memory.self_value.index_copy_(2, position_, m.Heads(x, block.self.v));
  hidden = Clamped(hidden + m.Attend(m.Heads(x, block.self.q), memory.self_key,
                                     memory.self_value, self_bias_, /*causal=*/false,
                                     block.self.o));
  x = m.Norm(hidden, block.cross.norm);
  return Clamped(hidden + m.Attend(m.Heads(x, block.cross.q), memory.cross_key,
                                   memory.cross_value, cross_bias_, /*causal=*/false,
                                   block.cross.o));
}

at::Tensor StaticDecoder::Counted() const {
  return options_.ignore_padding ? live_R1_ : at::Tensor();
}

void StaticDecoder::Choose(MoeLayer* layer, const at::Tensor& normed) {
  layer->routing =
      model_->Route(model_->decoder_.blocks[layer->block], normed, Counted(), {});
  Place(layer);
}

void StaticDecoder::Place(MoeLayer* layer) const {
  const at::Tensor experts = layer->routing.expert_ids_BT.reshape({-1});
  // One token a sequence: dropped where there is no capacity at all, or not counted.
  if (options_.ignore_padding || model_->config().expert_capacity < 1) {
    const at::Tensor dropped = layer->routing.dropped_BT.reshape({-1});
    layer->experts_R = experts.masked_fill(dropped, -1);
    layer->place_R = row_R_.masked_fill(dropped, -1);
  } else {
    // With leases the rows may be run in turns: not in what observers see.
    layer->experts_R = source_ ? experts.clone() : experts;
    layer->place_R = row_R_;
  }
}

// Into the memory that the part wrote, which the next one has recorded.
void StaticDecoder::ForceChoice(MoeLayer* layer) {
  const LayerRouting& routing = layer->routing;
  at::Tensor ids = routing.expert_ids_BT, gates = routing.gate_probs_BT;
  options_.routing_override->Replace(routing.layer, &ids, &gates);
  const SwitchConfig& c = model_->config();
  at::_assert_async(ids.ge(0).logical_and(ids.lt(c.num_experts)).all(),
                    "a routing override chose an expert that is not there");
  routing.expert_ids_BT.copy_(ids);
  routing.gate_probs_BT.copy_(gates);
  routing.dropped_BT.copy_(
      DroppedByCapacity(ids, c.num_experts, c.expert_capacity, Counted()));
  MoeLayer forced;
  forced.routing = routing;
  Place(&forced);
  layer->experts_R.copy_(forced.experts_R);
  layer->place_R.copy_(forced.place_R);
}

// Takes leases on what the rows need, as many at once as there may be, and runs all but
// the last ones, which the next part runs.
std::vector<ExpertLease> StaticDecoder::Lease(MoeLayer* layer,
                                              const at::Tensor& experts_R) {
  const int64_t* ids = experts_R.const_data_ptr<int64_t>();
  std::vector<int> experts;
  std::copy_if(ids, ids + rows_, std::back_inserter(experts),
               [](int64_t id) { return id >= 0; });
  std::ranges::sort(experts);
  experts.erase(std::ranges::unique(experts).begin(), experts.end());
  std::vector<ExpertLease> leases;
  // A dropped token contributes zero: where all are, nobody is asked.
  if (experts.empty()) return leases;
  const at::Tensor needed = experts_R.clone();  // on a CPU it is what Among is sent to
  source_->Begin(layer->routing.layer, experts);
  for (size_t left = experts.size(); left > 0;) {
    leases.clear();
    const auto turn =
        std::min(left, static_cast<size_t>(std::max(source_->LeasesAtOnce(), 1)));
    for (size_t i = 0; i < turn; ++i) {
      leases.push_back(source_->Next());
      layer->slots->Set(leases.back().expert(), leases.back().weights());
    }
    layer->slots->Send();
    left -= turn;
    if (turn < experts.size()) SendTo(layer->experts_R, Among(leases, needed));
    if (left > 0) RunExperts(*layer);
  }
  return leases;
}

void StaticDecoder::RunExperts(const MoeLayer& layer) const {
  const ExpertTable& table =
      layer.slots ? layer.slots->table() : *model_->executor_->Table(layer.routing.layer);
  ExpertGemvInto(model_->config().activation, table,
                 layer.routing.input_BTD.reshape({rows_, -1}), layer.experts_R,
                 expert_outputs_RD_);
}

at::Tensor StaticDecoder::AddExperts(const MoeLayer& layer,
                                     const at::Tensor& hidden) const {
  RunExperts(layer);
  TokenGroups places;
  places.place_N = layer.place_R;
  return Clamped(AddScattered(hidden.reshape({rows_, -1}), expert_outputs_RD_,
                              layer.routing.gate_probs_BT.reshape({-1}), places)
                     .view_as(hidden));
}

}  // namespace routecast
