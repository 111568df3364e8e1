#include "trainer/knn_estimate.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>

#include "common/random.h"
#include "models/routing_window.h"

namespace routecast {
namespace {

constexpr int64_t kNeighbours = 32;
constexpr uint64_t kStream = 0x6b6e6eULL;

// Vectors of one source layer with the labels of all its leads.
struct Samples {
  std::vector<at::Tensor> vectors;              // [n,D] a sequence
  std::vector<std::vector<at::Tensor>> labels;  // by lead, [n] a sequence
  int64_t count = 0;
};

Samples Gather(TraceDataset* dataset, SplitPart part, Stack stack, int source,
               int64_t most, uint64_t seed) {
  const MoeGeometry& g = dataset->geometry();
  const int leads =
      stack == Stack::kEncoder ? g.encoder_layers - 1 - source : g.decoder_layers;
  const auto sequences = dataset->Select(part, stack, WithHidden::kYes);
  Samples samples;
  samples.labels.resize(static_cast<size_t>(leads));
  if (sequences.empty()) return samples;
  const Permutation order(sequences.size(), Mix(seed, kStream));
  for (uint64_t i = 0; i < sequences.size() && samples.count < most; ++i) {
    const uint32_t sequence = sequences[order(i)];
    const auto trace = dataset->Read({&sequence, 1}, WithHidden::kYes)[0];
    const RoutingWindow window = WindowOf(*trace, stack, source, g.num_experts);
    samples.vectors.push_back(window.hidden_BTD.squeeze(0));
    for (int lead = 1; lead <= leads; ++lead) {
      samples.labels[size_t(lead - 1)].push_back(
          WindowLabels(*trace, stack, source, lead));
    }
    samples.count += samples.vectors.back().size(0);
  }
  return samples;
}

// Rows of one lead that have a label, at most `most`.
std::pair<at::Tensor, at::Tensor> OfLead(const Samples& samples, size_t lead,
                                         int64_t most) {
  const auto labels = at::cat(samples.labels[lead]);
  auto rows = labels.ge(0).nonzero().squeeze(1);
  if (rows.size(0) > most) rows = rows.narrow(0, 0, most);
  return {at::cat(samples.vectors).index_select(0, rows), labels.index_select(0, rows)};
}

}  // namespace

KnnEstimate ByNeighbours(const at::Tensor& train_ND, const at::Tensor& train_labels,
                         const at::Tensor& test_ND, const at::Tensor& test_labels,
                         int num_experts) {
  KnnEstimate estimate;
  estimate.neighbours = train_ND.size(0);
  estimate.samples = test_ND.size(0);
  if (estimate.neighbours == 0 || estimate.samples == 0) return estimate;
  // |a - b|^2 without |a|^2, which is the same for all neighbours of a.
  const auto distance =
      train_ND.square().sum(1).unsqueeze(0) - 2 * at::mm(test_ND, train_ND.t());
  const int64_t k = std::min(kNeighbours, estimate.neighbours);
  const auto nearest =
      std::get<1>(distance.topk(k, 1, /*largest=*/false, /*sorted=*/true));
  const auto labels = train_labels.index_select(0, nearest.flatten()).view({-1, k});
  const auto share = [&](const at::Tensor& guess) {
    return guess.eq(test_labels).to(at::kDouble).mean().item<double>();
  };
  estimate.top1_nearest = share(labels.select(1, 0));
  const auto votes = at::one_hot(labels, num_experts).sum(1);
  estimate.top1_of_32 = share(votes.argmax(1));
  const double e = num_experts, error = 1 - estimate.top1_nearest;
  const double inside = 1 - e / (e - 1) * error;
  if (num_experts > 1 && inside > 0) {
    estimate.bayes_bound = 1 - (e - 1) / e * (1 - std::sqrt(inside));
  }
  return estimate;
}

Json KnnEstimate::ToJson() const {
  return {{"phase", StackName(phase)},
          {"layer", layer},
          {"lead", lead},
          {"top1_nearest", top1_nearest},
          {"top1_of_32", top1_of_32},
          {"bayes_bound", bayes_bound},
          {"neighbours", neighbours},
          {"samples", samples}};
}

std::vector<KnnEstimate> EstimateByNeighbours(TraceDataset* dataset, uint64_t seed,
                                              int64_t most_neighbours,
                                              int64_t most_samples) {
  const c10::NoGradGuard no_grad;
  std::vector<KnnEstimate> estimates;
  if (!dataset->any_hidden()) return estimates;
  const MoeGeometry& g = dataset->geometry();
  for (const Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
    const int last = g.layers(stack) - (stack == Stack::kEncoder ? 1 : 0);
    for (int source = 0; source < last; ++source) {
      const Samples train =
          Gather(dataset, SplitPart::kTrain, stack, source, most_neighbours, seed);
      const Samples test =
          Gather(dataset, SplitPart::kTest, stack, source, most_samples, seed);
      if (train.count == 0 || test.count == 0) continue;
      for (size_t lead = 0; lead < train.labels.size(); ++lead) {
        const auto [a, a_labels] = OfLead(train, lead, most_neighbours);
        const auto [b, b_labels] = OfLead(test, lead, most_samples);
        KnnEstimate estimate = ByNeighbours(a, a_labels, b, b_labels, g.num_experts);
        estimate.phase = stack;
        estimate.layer = source;
        estimate.lead = static_cast<int>(lead) + 1;
        estimates.push_back(estimate);
      }
    }
  }
  return estimates;
}

}  // namespace routecast
