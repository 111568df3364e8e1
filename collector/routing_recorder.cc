#include "collector/routing_recorder.h"

#include <ATen/ATen.h>

#include <stdexcept>

namespace routecast {
namespace {

template <typename T>
void Append(std::vector<T>* to, const std::vector<T>& from) {
  to->insert(to->end(), from.begin(), from.end());
}

at::Tensor OnCpu(const at::Tensor& t, at::ScalarType type) {
  return t.to(at::kCPU, type).contiguous();
}

}  // namespace

RoutingRecorder::RoutingRecorder(const MoeGeometry& geometry,
                                 const RecordOptions& options,
                                 std::vector<bool> hidden_rows)
    : geometry_(geometry), options_(options), hidden_rows_(std::move(hidden_rows)) {
  for (const Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
    auto& rows = rows_[static_cast<size_t>(stack)];
    rows.resize(hidden_rows_.size());
    for (RowRecord& row : rows) row.layers.resize(geometry_.layers(stack));
  }
}

void RoutingRecorder::OnPassBegin(const PassInfo& pass) {
  if (pass.token_ids_BT.size(0) != static_cast<int64_t>(hidden_rows_.size())) {
    throw std::logic_error("RoutingRecorder: batch of another size");
  }
  pass_ = &pass;
  const auto ids = pass.token_ids_BT.accessor<int64_t, 2>();
  const auto valid = pass.valid_BT.accessor<bool, 2>();
  auto& rows = rows_[static_cast<size_t>(pass.stack)];
  for (int64_t b = 0; b < ids.size(0); ++b) {
    for (int64_t t = 0; t < ids.size(1); ++t) {
      if (valid[b][t]) {
        rows[static_cast<size_t>(b)].token_ids.push_back(
            static_cast<uint32_t>(ids[b][t]));
      }
    }
  }
}

void RoutingRecorder::OnRouting(const LayerRouting& routing) {
  const Stack stack = geometry_.StackOf(routing.layer);
  const int layer = geometry_.LayerInStack(routing.layer);
  auto& rows = rows_[static_cast<size_t>(stack)];
  const at::Tensor logits = routing.logits_BTE.to(at::kFloat);
  const int64_t k = std::min<int64_t>(std::max(2, options_.top_k), geometry_.num_experts);
  const auto [top, top_ids] = logits.topk(k, -1);
  const at::Tensor top_probs =
      options_.top_k > 0 ? OnCpu(logits.softmax(-1).gather(-1, top_ids), at::kFloat)
                         : at::Tensor();
  const at::Tensor top_cpu = OnCpu(top, at::kFloat),
                   top_ids_cpu = OnCpu(top_ids, at::kLong);
  const at::Tensor ids = OnCpu(routing.expert_ids_BT, at::kLong);
  const at::Tensor probs = OnCpu(routing.gate_probs_BT, at::kFloat);
  const at::Tensor dropped = OnCpu(routing.dropped_BT, at::kBool);
  const auto id = ids.accessor<int64_t, 2>();
  const auto prob = probs.accessor<float, 2>();
  const auto drop = dropped.accessor<bool, 2>();
  const auto best = top_cpu.accessor<float, 3>();
  const auto best_id = top_ids_cpu.accessor<int64_t, 3>();
  const auto valid = pass_->valid_BT.accessor<bool, 2>();
  for (int64_t b = 0; b < ids.size(0); ++b) {
    LayerRecord& record = rows[static_cast<size_t>(b)].layers[static_cast<size_t>(layer)];
    for (int64_t t = 0; t < ids.size(1); ++t) {
      if (!valid[b][t]) continue;
      record.ids.push_back(static_cast<uint16_t>(id[b][t]));
      if (options_.probs) record.probs.push_back(prob[b][t]);
      record.dropped.push_back(drop[b][t] ? 1 : 0);
      record.margins.push_back(k > 1 ? best[b][t][0] - best[b][t][1] : 0.0f);
      for (int j = 0; j < options_.top_k; ++j) {
        record.topk_ids.push_back(static_cast<uint16_t>(best_id[b][t][j]));
        record.topk_probs.push_back(top_probs[b][t][j].item<float>());
      }
    }
  }
  RecordHidden(routing, layer);
}

void RoutingRecorder::AppendStates(const at::Tensor& states_BTD, size_t row,
                                   std::vector<uint16_t>* to) const {
  const auto b = static_cast<int64_t>(row);
  const auto valid = pass_->valid_BT.accessor<bool, 2>();
  const int64_t width = states_BTD.size(2);
  const at::Tensor states = OnCpu(states_BTD.select(0, b), at::kBFloat16);
  const auto* bits = static_cast<const uint16_t*>(states.const_data_ptr());
  for (int64_t t = 0; t < states.size(0); ++t) {
    if (valid[b][t]) to->insert(to->end(), bits + t * width, bits + (t + 1) * width);
  }
}

void RoutingRecorder::RecordHidden(const LayerRouting& routing, int layer) {
  auto& rows = rows_[static_cast<size_t>(geometry_.StackOf(routing.layer))];
  for (size_t b = 0; b < hidden_rows_.size(); ++b) {
    if (!hidden_rows_[b]) continue;
    AppendStates(routing.input_BTD, b,
                 &rows[b].layers[static_cast<size_t>(layer)].hidden);
  }
}

void RoutingRecorder::OnPassEnd(const PassInfo& pass) {
  auto& rows = rows_[static_cast<size_t>(pass.stack)];
  for (size_t b = 0; pass.output_BTD.defined() && b < hidden_rows_.size(); ++b) {
    if (hidden_rows_[b]) AppendStates(pass.output_BTD, b, &rows[b].output);
  }
  pass_ = nullptr;
}

RoutingSpan RoutingRecorder::Take(Stack stack, int row) {
  RowRecord record =
      std::move(rows_[static_cast<size_t>(stack)][static_cast<size_t>(row)]);
  RoutingSpan span;
  if (record.token_ids.empty()) return span;
  span.num_tokens = static_cast<int>(record.token_ids.size());
  span.num_layers = geometry_.layers(stack);
  span.token_ids = std::move(record.token_ids);
  span.top_k = options_.top_k;
  for (const LayerRecord& layer : record.layers) {
    Append(&span.expert_ids, layer.ids);
    Append(&span.gate_probs, layer.probs);
    Append(&span.dropped, layer.dropped);
    Append(&span.margins, layer.margins);
    Append(&span.topk_ids, layer.topk_ids);
    Append(&span.topk_probs, layer.topk_probs);
    Append(&span.hidden, layer.hidden);
  }
  if (hidden_rows_[static_cast<size_t>(row)]) span.hidden_width = geometry_.d_model;
  span.output = std::move(record.output);
  return span;
}

}  // namespace routecast
