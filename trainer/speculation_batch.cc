#include "trainer/speculation_batch.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <tuple>

#include "common/random.h"

namespace routecast {
namespace {

constexpr int64_t kIgnore = -100;
// Up to this length a micro-batch holds all its sequences; attention takes memory by the
// square.
constexpr int64_t kFullTokens = 128;

using Traces = std::vector<const RoutingTrace*>;

// at::zeros runs in parallel where it is large: see WindowsOf.
template <typename T>
at::Tensor Zeros(at::IntArrayRef sizes) {
  at::Tensor x = at::empty(sizes, c10::CppTypeToScalarType<T>::value);
  std::fill_n(x.data_ptr<T>(), x.numel(), T{0});
  return x;
}

// What the router itself thought, at the place of each label. Traces without it leave the
// batch without a teacher.
void AddTeacher(const Traces& traces, const MicroBatch& micro, SpeculationBatch* batch) {
  const auto span_of = [&](const RoutingTrace& trace) -> const RoutingSpan& {
    return micro.stack == Stack::kEncoder ? trace.encoder : trace.decoder;
  };
  int64_t most = 0;
  bool probable = true;
  for (const RoutingTrace* trace : traces) {
    const RoutingSpan& span = span_of(*trace);
    if (span.top_k == 0 || span.topk_ids.empty()) return;
    probable = probable && !span.topk_probs.empty();
    most = std::max<int64_t>(most, span.top_k);
  }
  const auto& labels = batch->labels_BTH;
  const int64_t T = labels.size(1), H = labels.size(2);
  batch->teacher_ids_BTHK = Zeros<int64_t>({labels.size(0), T, H, most});
  int64_t* ids = batch->teacher_ids_BTHK.data_ptr<int64_t>();
  float* probs = nullptr;
  if (probable) {
    batch->teacher_probs_BTHK = Zeros<float>({labels.size(0), T, H, most});
    probs = batch->teacher_probs_BTHK.data_ptr<float>();
  }
  for (size_t b = 0; b < traces.size(); ++b) {
    const RoutingSpan& span = span_of(*traces[b]);
    const int64_t tokens = span.num_tokens, layers = span.num_layers, k = span.top_k;
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t lead = 1; lead <= H; ++lead) {
        const int64_t target = micro.source_layer + lead;
        const int64_t token = t + target / layers;  // the encoder has no leads past it
        if (token >= tokens) continue;
        const size_t from = static_cast<size_t>(((target % layers) * tokens + token) * k);
        const int64_t to = ((static_cast<int64_t>(b) * T + t) * H + lead - 1) * most;
        std::copy_n(span.topk_ids.begin() + static_cast<int64_t>(from), k, ids + to);
        if (!probable) continue;
        std::copy_n(span.topk_probs.begin() + static_cast<int64_t>(from), k, probs + to);
      }
    }
  }
}

}  // namespace

SpeculationBatch MakeSpeculationBatch(const MicroBatch& micro, TraceDataset* dataset,
                                      WithHidden hidden) {
  const MoeGeometry& g = dataset->geometry();
  const int leads = NumLeadsOf(g, micro.stack, micro.source_layer);
  const bool reads = SeesRouterInputs(micro.stack, micro.source_layer);
  const auto kept = dataset->Read(micro.sequences, reads ? hidden : WithHidden::kNo);
  Traces traces;
  for (const auto& trace : kept) traces.push_back(trace.get());
  SpeculationBatch batch;
  batch.id = micro.id;
  batch.window = WindowsOf(traces, micro.stack, micro.source_layer, g.num_experts,
                           g.experts_per_token, hidden != WithHidden::kNo);
  batch.window.traced_model = micro.store;
  WindowTargets targets = WindowTargetsOf(traces, micro.stack, micro.source_layer, leads,
                                          g.experts_per_token);
  batch.labels_BTH = std::move(targets.labels_BTH);
  batch.others_BTHK = std::move(targets.others_BTHK);
  batch.num_labels = targets.num_labels;
  batch.documents_BT = at::empty(batch.window.token_ids_BT.sizes(), at::kLong);
  int64_t* documents = batch.documents_BT.data_ptr<int64_t>();
  for (const RoutingTrace* trace : traces) {
    documents = std::fill_n(documents, batch.documents_BT.size(1),
                            static_cast<int64_t>(trace->document_id));
  }
  if (dataset->keeps_top_k()) {
    AddTeacher(traces, micro, &batch);
    AddGates(traces, &batch.window);
  }
  return batch;
}

at::Tensor LabelSets(const SpeculationBatch& batch) {
  const auto first = batch.labels_BTH.unsqueeze(3);
  if (!batch.others_BTHK.defined()) return first;
  return at::cat({first, batch.others_BTHK.masked_fill(first.lt(0), kIgnore)}, 3);
}

void ForgetRouterInputs(RoutingWindow* window) {
  window->hidden_BTD = window->context_BTD = at::Tensor();
  window->source_BSD = window->source_valid_BS = at::Tensor();
  window->attention_entropy_BTA = window->attended_ids_BTAK = at::Tensor();
}

RoutingWindow WindowTo(const RoutingWindow& window, at::Device device) {
  RoutingWindow moved = window;
  moved.token_ids_BT = window.token_ids_BT.to(device);
  moved.valid_BT = window.valid_BT.to(device);
  moved.experts_BTL = window.experts_BTL.to(device);
  if (window.others_BTLK.defined()) moved.others_BTLK = window.others_BTLK.to(device);
  if (window.hidden_BTD.defined()) moved.hidden_BTD = window.hidden_BTD.to(device);
  if (window.context_BTD.defined()) moved.context_BTD = window.context_BTD.to(device);
  if (window.source_BSD.defined()) {
    moved.source_BSD = window.source_BSD.to(device);
    moved.source_valid_BS = window.source_valid_BS.to(device);
  }
  TrainingHints& hints = moved.training;
  for (at::Tensor* x :
       {&moved.gates_BTE, &moved.attention_entropy_BTA, &moved.attended_ids_BTAK,
        &hints.teacher_BTH, &hints.order_B, &hints.share_B, &hints.hidden_ids_BTL}) {
    if (x->defined()) *x = x->to(device);
  }
  return moved;
}

std::vector<SampleGroup> GroupsOf(const TraceDataset& dataset, SplitPart part,
                                  WithHidden hidden, int store) {
  const MoeGeometry& g = dataset.geometry();
  std::vector<SampleGroup> groups;
  for (const Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
    std::shared_ptr<const SamplePool> pools[2];
    for (const bool with : {false, true}) {
      auto pool = std::make_shared<SamplePool>();
      pool->sequences =
          dataset.Select(part, stack, with ? WithHidden::kYes : WithHidden::kNo);
      for (const uint32_t s : pool->sequences) {
        pool->lengths.push_back(dataset.length(s, stack));
      }
      pools[with] = pool;
    }
    for (int source = -1; source < g.layers(stack); ++source) {
      const auto& pool =
          pools[hidden != WithHidden::kNo && SeesRouterInputs(stack, source)];
      if (NumLeadsOf(g, stack, source) < 1 || pool->sequences.empty()) continue;
      groups.push_back({stack, source, pool, store});
    }
  }
  return groups;
}

std::vector<SampleGroup> GroupsOfAll(const std::vector<TraceDataset*>& stores,
                                     SplitPart part, WithHidden hidden) {
  std::vector<SampleGroup> all;
  for (size_t i = 0; i < stores.size(); ++i) {
    for (SampleGroup& group : GroupsOf(*stores[i], part, hidden, static_cast<int>(i))) {
      all.push_back(std::move(group));
    }
  }
  return all;
}

std::vector<MicroBatch> EvaluationBatches(const TraceDataset& dataset,
                                          const std::vector<SampleGroup>& groups,
                                          int micro_batch, uint64_t sequences,
                                          uint64_t seed) {
  std::vector<MicroBatch> batches;
  for (const SampleGroup& group : groups) {
    const uint64_t all = group.pool->sequences.size();
    const uint64_t count = sequences == 0 ? all : std::min(all, sequences);
    const Permutation choice(all, seed);  // the same sequences for every source
    std::vector<uint64_t> chosen;
    for (uint64_t i = 0; i < count; ++i) chosen.push_back(choice(i));
    const SamplePool& pool = *group.pool;
    const auto has_hidden = [&](uint64_t i) {
      return dataset.sequences()[pool.sequences[i]].has_hidden;
    };
    std::sort(chosen.begin(), chosen.end(), [&](uint64_t a, uint64_t b) {
      return std::tuple(has_hidden(a), pool.lengths[a], a) <
             std::tuple(has_hidden(b), pool.lengths[b], b);
    });
    for (uint64_t i = 0; i < count; ++i) {
      const auto tokens = static_cast<int64_t>(pool.lengths[chosen[i]]);
      const int64_t longest = std::max(tokens, kFullTokens);
      const auto full = [&] {
        const auto held = static_cast<int64_t>(batches.back().sequences.size());
        return (held + 1) * longest * longest > micro_batch * kFullTokens * kFullTokens;
      };
      if (i == 0 || has_hidden(chosen[i]) != has_hidden(chosen[i - 1]) || full()) {
        batches.push_back(
            {batches.size(), group.stack, group.source_layer, {}, group.store});
      }
      batches.back().sequences.push_back(pool.sequences[chosen[i]]);
    }
  }
  return batches;
}

}  // namespace routecast
