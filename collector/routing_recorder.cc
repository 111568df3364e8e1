#include "collector/routing_recorder.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "common/errors.h"
#include "common/wide_loops.h"

namespace routecast {
namespace {

template <typename T>
void Append(std::vector<T>* to, const std::vector<T>& from) {
  to->insert(to->end(), from.begin(), from.end());
}

// Appends `width` numbers of each real token.
template <typename From, typename To>
void AppendReal(const bool* real, int64_t num_tokens, int64_t width, const From* from,
                std::vector<To>* to) {
  const auto count = static_cast<size_t>(std::count(real, real + num_tokens, true));
  const size_t before = to->size();
  to->resize(before + count * static_cast<size_t>(width));
  To* at = to->data() + before;
  for (int64_t t = 0; t < num_tokens; ++t, from += width) {
    if (!real[t]) continue;
    for (int64_t j = 0; j < width; ++j) *at++ = static_cast<To>(from[j]);
  }
}

// The largest number minus the second of each row. One pass over the logits, in lanes:
// a general top-k took as long as all else that recording does.
ROUTECAST_WIDE void RowMargins(const float* logits, int64_t num_rows, int64_t num_experts,
                               float* margins) {
  constexpr int kLanes = 16;
  constexpr float kLeast = -std::numeric_limits<float>::infinity();
  for (int64_t r = 0; r < num_rows; ++r, logits += num_experts) {
    float best[kLanes], second[kLanes];
    std::fill_n(best, kLanes, kLeast);
    std::fill_n(second, kLanes, kLeast);
    const int64_t whole = num_experts - num_experts % kLanes;
    for (int64_t e = 0; e < whole; e += kLanes) {
      for (int j = 0; j < kLanes; ++j) {
        const float x = logits[e + j];
        const float lower = x < best[j] ? x : best[j];
        best[j] = x < best[j] ? best[j] : x;
        second[j] = lower < second[j] ? second[j] : lower;
      }
    }
    float first = kLeast, next = kLeast;
    const auto take = [&](float x) {
      next = std::max(next, std::min(first, x));
      first = std::max(first, x);
    };
    for (int64_t e = whole; e < num_experts; ++e) take(logits[e]);
    for (int j = 0; j < kLanes; ++j) {
      take(best[j]);
      take(second[j]);
    }
    margins[r] = first - next;
  }
}

// Where the logits lie. ids and probs [B,T,K], only where K > 0.
struct TopLogits {
  at::Tensor margins, ids, probs;
};

TopLogits TopOf(const at::Tensor& logits_BTE, int top_k) {
  const int64_t num_experts = logits_BTE.size(-1);
  TopLogits top;
  if (num_experts == 1) {
    top.margins = at::zeros_like(logits_BTE.select(-1, 0));
  }
  if (num_experts > 1 && logits_BTE.is_cpu()) {
    const at::Tensor rows = logits_BTE.contiguous();
    top.margins = at::empty({rows.size(0), rows.size(1)}, at::kFloat);
    RowMargins(rows.const_data_ptr<float>(), top.margins.numel(), num_experts,
               top.margins.mutable_data_ptr<float>());
    if (top_k == 0) return top;
  }
  const int64_t k = std::min<int64_t>(std::max(2, top_k), num_experts);
  const auto [best, best_ids] = logits_BTE.topk(k, -1);
  if (!top.margins.defined()) {
    top.margins = best.select(-1, 0) - best.select(-1, 1);
  }
  if (top_k > 0) {
    top.ids = best_ids.narrow(-1, 0, top_k);
    top.probs = logits_BTE.softmax(-1).gather(-1, top.ids);
  }
  return top;
}

// Of one token and head: the entropy of its weights, and the keys with the largest.
void AppendSummary(const float* weights, int64_t num_keys, std::vector<float>* entropy,
                   std::vector<uint16_t>* keys) {
  double sum = 0;
  float best[kStrongestKeys] = {};
  uint16_t positions[kStrongestKeys];
  std::fill_n(positions, kStrongestKeys, kNoKey);
  for (int64_t s = 0; s < num_keys; ++s) {
    const float w = weights[s];
    if (!(w > 0)) continue;
    sum -= static_cast<double>(w) * std::log(static_cast<double>(w));
    // Only a larger one goes before what is there: of equal ones the first stays first.
    int place = kStrongestKeys;
    while (place > 0 && w > best[place - 1]) --place;
    if (place == kStrongestKeys) continue;
    for (int i = kStrongestKeys - 1; i > place; --i) {
      best[i] = best[i - 1];
      positions[i] = positions[i - 1];
    }
    best[place] = w;
    positions[place] = static_cast<uint16_t>(s);
  }
  entropy->push_back(static_cast<float>(std::max(0.0, sum)));
  keys->insert(keys->end(), positions, positions + kStrongestKeys);
}

// The reference's argmax takes such a token for one that chose expert 0.
[[noreturn]] void RefuseRouting(Stack stack, size_t layer) {
  throw DataError(ErrorText(
      std::string("MoE layer ") + std::to_string(layer) + " of the " + StackName(stack) +
          " cannot choose an expert",
      "a token's router probabilities are no numbers: the model's arithmetic overflows, "
      "or its weights are damaged",
      "fetch the weights again, use --dtype=fp32, or leave such "
      "sequences out: --nonfinite=skip"));
}

}  // namespace

RoutingRecorder::RoutingRecorder(const MoeGeometry& geometry,
                                 const RecordOptions& options,
                                 std::vector<bool> hidden_rows, int64_t ring_bytes,
                                 HostCopier* copier)
    : geometry_(geometry),
      options_(options),
      hidden_rows_(std::move(hidden_rows)),
      no_numbers_(hidden_rows_.size(), false),
      ring_(ring_bytes, copier) {
  for (const Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
    auto& rows = rows_[static_cast<size_t>(stack)];
    rows.resize(hidden_rows_.size());
    for (RowRecord& row : rows) row.layers.resize(geometry_.layers(stack));
  }
  for (size_t b = 0; b < hidden_rows_.size(); ++b) {
    if (hidden_rows_[b]) hidden_places_.push_back(static_cast<int64_t>(b));
  }
}

void RoutingRecorder::OnPassBegin(const PassInfo& pass) {
  if (pass.token_ids_BT.size(0) != static_cast<int64_t>(hidden_rows_.size())) {
    throw std::logic_error("RoutingRecorder: batch of another size");
  }
  valid_BT_ = pass.valid_BT.to(at::kBool).contiguous();
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
  const auto layer = static_cast<size_t>(geometry_.LayerInStack(routing.layer));
  auto& rows = rows_[static_cast<size_t>(stack)];
  const TopLogits top = TopOf(routing.logits_BTE.to(at::kFloat), options_.top_k);
  // What is added is 0, or no number where the gate is none: one plane tells of both.
  const at::Tensor margins = top.margins + routing.gate_probs_BT.to(at::kFloat) * 0;
  std::vector<at::Tensor> planes = {routing.expert_ids_BT.to(at::kLong),
                                    routing.dropped_BT.to(at::kBool), margins};
  if (options_.probs) planes.push_back(routing.gate_probs_BT.to(at::kFloat));
  if (options_.top_k > 0) planes.insert(planes.end(), {top.ids, top.probs});
  ring_.Add(std::move(planes), [this, &rows, stack, layer, valid = valid_BT_](
                                   const std::vector<at::Tensor>& on_host) {
    const int64_t num_tokens = valid.size(1), k = options_.top_k;
    for (size_t b = 0; b < rows.size(); ++b) {
      LayerRecord& record = rows[b].layers[layer];
      const int64_t begin = static_cast<int64_t>(b) * num_tokens;
      const bool* real = valid.const_data_ptr<bool>() + begin;
      const auto* plane = on_host.data();
      AppendReal(real, num_tokens, 1, plane++->const_data_ptr<int64_t>() + begin,
                 &record.ids);
      AppendReal(real, num_tokens, 1, plane++->const_data_ptr<bool>() + begin,
                 &record.dropped);
      const auto before = static_cast<int64_t>(record.margins.size());
      AppendReal(real, num_tokens, 1, plane++->const_data_ptr<float>() + begin,
                 &record.margins);
      if (std::any_of(record.margins.begin() + before, record.margins.end(),
                      [](float margin) { return std::isnan(margin); })) {
        if (!options_.mark_no_numbers) RefuseRouting(stack, layer);
        no_numbers_[b] = true;
      }
      if (options_.probs) {
        AppendReal(real, num_tokens, 1, plane++->const_data_ptr<float>() + begin,
                   &record.probs);
      }
      if (k == 0) continue;
      AppendReal(real, num_tokens, k, plane++->const_data_ptr<int64_t>() + begin * k,
                 &record.topk_ids);
      AppendReal(real, num_tokens, k, plane->const_data_ptr<float>() + begin * k,
                 &record.topk_probs);
    }
  });
  RecordStates(routing.input_BTD,
               [&rows, layer](size_t row) { return &rows[row].layers[layer].hidden; });
}

void RoutingRecorder::ForHiddenRows(
    const at::Tensor& batch, at::ScalarType type,
    const std::function<void(size_t row, const at::Tensor&)>& use) {
  if (!ring_.Copies(batch)) {
    for (const int64_t b : hidden_places_) {
      use(static_cast<size_t>(b), batch.select(0, b).to(type).contiguous());
    }
    return;
  }
  if (hidden_places_.empty()) return;
  if (!hidden_index_.defined()) {
    hidden_index_ = at::tensor(hidden_places_, at::kLong).to(batch.device());
  }
  // Few copies, and no row that nobody asked for.
  const auto count = static_cast<int64_t>(hidden_places_.size());
  const int64_t row_bytes =
      batch.numel() / batch.size(0) * static_cast<int64_t>(c10::elementSize(type));
  const int64_t rows_a_set =
      std::clamp<int64_t>(ring_.set_bytes() / std::max<int64_t>(1, row_bytes), 1, count);
  for (int64_t first = 0; first < count; first += rows_a_set) {
    const int64_t rows = std::min(rows_a_set, count - first);
    ring_.Add({batch.index_select(0, hidden_index_.narrow(0, first, rows)).to(type)},
              [this, first, use](const std::vector<at::Tensor>& on_host) {
                for (int64_t i = 0; i < on_host[0].size(0); ++i) {
                  use(static_cast<size_t>(hidden_places_[static_cast<size_t>(first + i)]),
                      on_host[0].select(0, i));
                }
              });
  }
}

void RoutingRecorder::RecordStates(
    const at::Tensor& states_BTD,
    const std::function<std::vector<uint16_t>*(size_t row)>& to_of) {
  ForHiddenRows(states_BTD, at::kBFloat16,
                [to_of, valid = valid_BT_](size_t row, const at::Tensor& states_TD) {
                  const int64_t num_tokens = states_TD.size(0), width = states_TD.size(1);
                  const bool* real = valid.const_data_ptr<bool>() +
                                     static_cast<int64_t>(row) * num_tokens;
                  const auto* bits =
                      static_cast<const uint16_t*>(states_TD.const_data_ptr());
                  std::vector<uint16_t>* to = to_of(row);
                  for (int64_t t = 0; t < num_tokens; ++t, bits += width) {
                    if (real[t]) to->insert(to->end(), bits, bits + width);
                  }
                });
}

void RoutingRecorder::OnPassEnd(const PassInfo& pass) {
  auto& rows = rows_[static_cast<size_t>(pass.stack)];
  if (options_.output && pass.output_BTD.defined()) {
    RecordStates(pass.output_BTD, [&rows](size_t row) { return &rows[row].output; });
  }
  // A recorded decoder step writes the next pass over this one's tensors.
  ring_.HoldStream();
}

bool RoutingRecorder::WantsAttention() const {
  return options_.attention &&
         std::find(hidden_rows_.begin(), hidden_rows_.end(), true) != hidden_rows_.end();
}

void RoutingRecorder::OnAttention(const LayerAttention& attention) {
  const Stack stack = geometry_.StackOf(attention.layer);
  const auto layer = static_cast<size_t>(geometry_.LayerInStack(attention.layer));
  auto& rows = rows_[static_cast<size_t>(stack)];
  num_heads_ = attention.weights_BHTS.size(1);
  ForHiddenRows(attention.weights_BHTS, at::kFloat,
                [&rows, layer, cross = attention.cross, valid = valid_BT_](
                    size_t row, const at::Tensor& weights_HTS) {
                  const int64_t num_heads = weights_HTS.size(0);
                  const int64_t num_tokens = weights_HTS.size(1);
                  const int64_t num_keys = weights_HTS.size(2);
                  const bool* real = valid.const_data_ptr<bool>() +
                                     static_cast<int64_t>(row) * num_tokens;
                  const float* weights = weights_HTS.const_data_ptr<float>();
                  Attended& to = rows[row].layers[layer].attended[cross];
                  for (int64_t t = 0; t < num_tokens; ++t) {
                    if (!real[t]) continue;
                    for (int64_t h = 0; h < num_heads; ++h) {
                      AppendSummary(weights + (h * num_tokens + t) * num_keys, num_keys,
                                    &to.entropy, &to.keys);
                    }
                  }
                });
}

void RoutingRecorder::TakeAttention(Stack stack, const RowRecord& record,
                                    RoutingSpan* span) const {
  const int kinds = stack == Stack::kDecoder ? 2 : 1;
  span->attention_heads = static_cast<int>(num_heads_) * kinds;
  for (const LayerRecord& layer : record.layers) {
    for (int64_t t = 0; t < span->num_tokens; ++t) {
      for (int kind = 0; kind < kinds; ++kind) {  // a token's heads of both side by side
        const Attended& from = layer.attended[kind];
        const auto entropy = from.entropy.begin() + t * num_heads_;
        const auto keys = from.keys.begin() + t * num_heads_ * kStrongestKeys;
        span->attention_entropy.insert(span->attention_entropy.end(), entropy,
                                       entropy + num_heads_);
        span->attention_keys.insert(span->attention_keys.end(), keys,
                                    keys + num_heads_ * kStrongestKeys);
      }
    }
  }
}

bool RoutingRecorder::NoNumbers(int row) {
  ring_.Finish();
  return no_numbers_[static_cast<size_t>(row)];
}

RoutingSpan RoutingRecorder::Take(Stack stack, int row) {
  ring_.Finish();
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
  if (WantsAttention() && hidden_rows_[static_cast<size_t>(row)]) {
    TakeAttention(stack, record, &span);
  }
  return span;
}

}  // namespace routecast
