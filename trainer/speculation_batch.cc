#include "trainer/speculation_batch.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <tuple>

#include "common/random.h"
#include "trainer/speculation_sets.h"

namespace routecast {
namespace {

constexpr int64_t kIgnore = -100;
constexpr double kLargestConfidence = 1 - 1e-6;  // keeps the logarithm finite

std::vector<std::shared_ptr<const RoutingTrace>> TracesOf(const MicroBatch& micro,
                                                          TraceDataset* dataset,
                                                          WithHidden hidden) {
  return dataset->Read(micro.sequences, SeesRouterInputs(micro.stack, micro.source_layer)
                                            ? hidden
                                            : WithHidden::kNo);
}

// What the router itself thought, at the place of each label. Traces without it leave the
// batch without a teacher.
void AddTeacher(const std::vector<std::shared_ptr<const RoutingTrace>>& traces,
                const MicroBatch& micro, SpeculationBatch* batch) {
  const auto span_of = [&](const RoutingTrace& trace) -> const RoutingSpan& {
    return micro.stack == Stack::kEncoder ? trace.encoder : trace.decoder;
  };
  int64_t most = 0;
  for (const auto& trace : traces) {
    const RoutingSpan& span = span_of(*trace);
    if (span.top_k == 0 || span.topk_probs.empty()) return;
    most = std::max<int64_t>(most, span.top_k);
  }
  const auto& labels = batch->labels_BTH;
  const int64_t T = labels.size(1), H = labels.size(2);
  batch->teacher_ids_BTHK = at::zeros({labels.size(0), T, H, most}, at::kLong);
  batch->teacher_probs_BTHK = at::zeros({labels.size(0), T, H, most});
  int64_t* ids = batch->teacher_ids_BTHK.data_ptr<int64_t>();
  float* probs = batch->teacher_probs_BTHK.data_ptr<float>();
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
  const auto traces = TracesOf(micro, dataset, hidden);
  std::vector<RoutingWindow> windows;
  for (const auto& trace : traces) {
    windows.push_back(WindowOf(*trace, micro.stack, micro.source_layer, g.num_experts));
  }
  SpeculationBatch batch;
  batch.id = micro.id;
  batch.window = BatchWindows(windows);
  if (hidden == WithHidden::kNo) ForgetRouterInputs(&batch.window);
  const int64_t b = batch.window.token_ids_BT.size(0);
  const int64_t t = batch.window.token_ids_BT.size(1);
  batch.labels_BTH = at::full({b, t, leads}, kIgnore, at::kLong);
  batch.documents_BT = at::empty({b, t}, at::kLong);
  for (int64_t i = 0; i < b; ++i) {
    const RoutingTrace& trace = *traces[static_cast<size_t>(i)];
    batch.documents_BT[i].fill_(static_cast<int64_t>(trace.document_id));
    for (int lead = 1; lead <= leads; ++lead) {
      const at::Tensor labels =
          WindowLabels(trace, micro.stack, micro.source_layer, lead);
      batch.labels_BTH.select(0, i)
          .select(1, lead - 1)
          .narrow(0, 0, labels.size(0))
          .copy_(labels);
    }
  }
  batch.num_labels = batch.labels_BTH.ne(kIgnore).sum().item<int64_t>();
  if (dataset->keeps_top_k()) AddTeacher(traces, micro, &batch);
  return batch;
}

void ForgetRouterInputs(RoutingWindow* window) {
  window->hidden_BTD = window->context_BTD = at::Tensor();
  window->source_BSD = window->source_valid_BS = at::Tensor();
}

RoutingWindow WindowTo(const RoutingWindow& window, at::Device device) {
  RoutingWindow moved = window;
  moved.token_ids_BT = window.token_ids_BT.to(device);
  moved.valid_BT = window.valid_BT.to(device);
  moved.experts_BTL = window.experts_BTL.to(device);
  if (window.hidden_BTD.defined()) moved.hidden_BTD = window.hidden_BTD.to(device);
  if (window.context_BTD.defined()) moved.context_BTD = window.context_BTD.to(device);
  if (window.source_BSD.defined()) {
    moved.source_BSD = window.source_BSD.to(device);
    moved.source_valid_BS = window.source_valid_BS.to(device);
  }
  return moved;
}

std::vector<SampleGroup> GroupsOf(const TraceDataset& dataset, SplitPart part,
                                  WithHidden hidden) {
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
          pools[hidden == WithHidden::kYes && SeesRouterInputs(stack, source)];
      if (NumLeadsOf(g, stack, source) < 1 || pool->sequences.empty()) continue;
      groups.push_back({stack, source, pool});
    }
  }
  return groups;
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
      if (i == 0 || has_hidden(chosen[i]) != has_hidden(chosen[i - 1]) ||
          batches.back().sequences.size() == static_cast<size_t>(micro_batch)) {
        batches.push_back({batches.size(), group.stack, group.source_layer, {}});
      }
      batches.back().sequences.push_back(pool.sequences[chosen[i]]);
    }
  }
  return batches;
}

namespace {

// KL(teacher || student) a row, of the router's top-k with the rest spread evenly over
// the other experts; both at `temperature`.
at::Tensor Distillation(const at::Tensor& logits_NE, const at::Tensor& ids_NK,
                        const at::Tensor& probs_NK, double temperature) {
  const int64_t experts = logits_NE.size(1), k = ids_NK.size(1);
  const auto left = (1 - probs_NK.sum(1, true)).clamp_min(0) /
                    static_cast<double>(std::max<int64_t>(1, experts - k));
  auto teacher = left.expand({-1, experts}).contiguous().scatter(1, ids_NK, probs_NK);
  teacher = teacher.clamp_min(1e-8).pow(1 / temperature);
  teacher = teacher / teacher.sum(1, true);
  const auto student = at::log_softmax(logits_NE / temperature, 1);
  return (teacher * (teacher.log() - student)).sum(1) * (temperature * temperature);
}

at::Tensor NextTokenLoss(const SpeculationOutput& output, const SpeculationBatch& batch) {
  const int64_t tokens = batch.window.token_ids_BT.size(1);
  const auto next = [&](const at::Tensor& x) { return x.narrow(1, 1, tokens - 1); };
  const at::Tensor ids =
      next(batch.window.token_ids_BT)
          .masked_fill(next(batch.window.valid_BT).logical_not(), kIgnore)
          .to(output.next_token_BTV.device());
  return at::cross_entropy_loss(
      output.next_token_BTV.narrow(1, 0, tokens - 1).flatten(0, 1), ids.flatten(), {},
      at::Reduction::Sum, kIgnore);
}

void RequireFinite(const at::Tensor& total, const SpeculationBatch& batch) {
  if (std::isfinite(total.item<double>())) return;
  throw std::logic_error("the loss is not finite in micro-batch " +
                         std::to_string(batch.id) + " (" + StackName(batch.window.stack) +
                         ", source layer " + std::to_string(batch.window.source_layer) +
                         ")");
}

}  // namespace

LossSums SpeculationLoss(const SpeculationOutput& output, const SpeculationBatch& batch,
                         const LossWeights& weights) {
  const int64_t experts = output.logits_BTHE.size(-1);
  const auto device = output.logits_BTHE.device();
  const at::Tensor labels = batch.labels_BTH.to(device).flatten();
  const at::Tensor rows = labels.ne(kIgnore).nonzero().squeeze(1);
  const at::Tensor logits =
      output.logits_BTHE.reshape({-1, experts}).index_select(0, rows);
  const at::Tensor truth = labels.index_select(0, rows);
  at::Tensor weight;
  if (batch.weights_BT.defined()) {
    weight = batch.weights_BT.to(device)
                 .unsqueeze(2)
                 .expand(batch.labels_BTH.sizes())
                 .flatten()
                 .index_select(0, rows);
  }
  const auto sum = [&](const at::Tensor& x) {
    return weight.defined() ? (x * weight).sum() : x.sum();
  };
  at::Tensor routing = sum(at::cross_entropy_loss(logits, truth, {}, at::Reduction::None,
                                                  kIgnore, weights.label_smoothing));
  if (weights.distill > 0 && batch.teacher_ids_BTHK.defined()) {
    const int64_t k = batch.teacher_ids_BTHK.size(3);
    const auto teacher = [&](const at::Tensor& x) {
      return x.to(device).reshape({-1, k}).index_select(0, rows);
    };
    routing = routing * (1 - weights.distill) +
              weights.distill * sum(Distillation(logits, teacher(batch.teacher_ids_BTHK),
                                                 teacher(batch.teacher_probs_BTHK),
                                                 weights.distill_temperature));
  }
  LossSums sums;
  sums.labels = rows.size(0);
  sums.total = routing;
  const at::Tensor scores = logits.detach();
  const at::Tensor ahead =
      scores.gt(scores.gather(1, truth.unsqueeze(1))).sum(1);  // experts above the true
  const at::Tensor right = ahead.eq(0).to(at::kFloat);
  if (weights.confidence > 0 && output.confidence_BTH.requires_grad()) {
    const at::Tensor confidence =
        output.confidence_BTH.flatten().index_select(0, rows).clamp(
            1 - kLargestConfidence, kLargestConfidence);
    sums.total = sums.total +
                 weights.confidence * sum(at::binary_cross_entropy(confidence, right, {},
                                                                   at::Reduction::None));
  }
  if (weights.next_token > 0 && output.next_token_BTV.defined() &&
      batch.window.token_ids_BT.size(1) > 1) {
    sums.total = sums.total + weights.next_token * NextTokenLoss(output, batch);
  }
  if (weights.set > 0 && batch.window.stack == Stack::kEncoder) {
    sums.total = sums.total +
                 weights.set * SetLoss(output.logits_BTHE, batch.labels_BTH.to(device));
  }
  if (output.own_loss.defined() && output.logits_BTHE.requires_grad()) {
    sums.total = sums.total + output.own_loss.sum();
  }
  sums.cross_entropy =
      at::cross_entropy_loss(scores, truth, {}, at::Reduction::Sum).item<double>();
  sums.top1 = right.sum().item<double>();
  sums.top4 = ahead.lt(4).sum().item<double>();
  RequireFinite(sums.total, batch);
  return sums;
}

}  // namespace routecast
