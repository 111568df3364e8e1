#include "trainer/speculation_batch.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <tuple>

#include "common/random.h"

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

LossSums SpeculationLoss(const SpeculationOutput& output, const SpeculationBatch& batch,
                         double confidence_weight, double next_token_weight) {
  const int64_t experts = output.logits_BTHE.size(-1);
  const at::Tensor labels = batch.labels_BTH.to(output.logits_BTHE.device()).flatten();
  const at::Tensor rows = labels.ne(kIgnore).nonzero().squeeze(1);
  const at::Tensor logits =
      output.logits_BTHE.reshape({-1, experts}).index_select(0, rows);
  const at::Tensor truth = labels.index_select(0, rows);
  const at::Tensor cross_entropy =
      at::cross_entropy_loss(logits, truth, {}, at::Reduction::Sum);
  LossSums sums;
  sums.labels = rows.size(0);
  sums.total = cross_entropy;
  const at::Tensor scores = logits.detach();
  const at::Tensor ahead =
      scores.gt(scores.gather(1, truth.unsqueeze(1))).sum(1);  // experts above the true
  const at::Tensor right = ahead.eq(0).to(at::kFloat);
  if (confidence_weight > 0 && output.confidence_BTH.defined()) {
    const at::Tensor confidence =
        output.confidence_BTH.flatten().index_select(0, rows).clamp(
            1 - kLargestConfidence, kLargestConfidence);
    sums.total =
        sums.total + confidence_weight * at::binary_cross_entropy(confidence, right, {},
                                                                  at::Reduction::Sum);
  }
  const int64_t tokens = batch.window.token_ids_BT.size(1);
  if (next_token_weight > 0 && output.next_token_BTV.defined() && tokens > 1) {
    const auto next = [&](const at::Tensor& x) { return x.narrow(1, 1, tokens - 1); };
    const at::Tensor ids =
        next(batch.window.token_ids_BT)
            .masked_fill(next(batch.window.valid_BT).logical_not(), kIgnore)
            .to(output.next_token_BTV.device());
    sums.total =
        sums.total + next_token_weight *
                         at::cross_entropy_loss(
                             output.next_token_BTV.narrow(1, 0, tokens - 1).flatten(0, 1),
                             ids.flatten(), {}, at::Reduction::Sum, kIgnore);
  }
  sums.cross_entropy = cross_entropy.item<double>();
  sums.top1 = right.sum().item<double>();
  sums.top4 = ahead.lt(4).sum().item<double>();
  if (!std::isfinite(sums.total.item<double>())) {
    throw std::logic_error("the loss is not finite in micro-batch " +
                           std::to_string(batch.id) + " (" +
                           StackName(batch.window.stack) + ", source layer " +
                           std::to_string(batch.window.source_layer) + ")");
  }
  return sums;
}

}  // namespace routecast
