#include "trainer/knn_estimate.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>

#include "common/random.h"
#include "models/routing_window.h"
#include "models/speculation_config.h"
#include "trainer/agreed_stop.h"

namespace routecast {
namespace {

constexpr int64_t kNeighbours = 32;
constexpr int64_t kSetLayers = 4;
constexpr uint64_t kStream = 0x6b6e6eULL;

// Vectors of one source layer with the labels of all its leads, one row a token.
struct Samples {
  at::Tensor vectors_ND, labels_NHK;
};

// The sets of experts of each token's newest layers as zeros and ones, [T,D].
at::Tensor SetVectors(const RoutingWindow& window) {
  const int64_t E = window.num_experts, T = window.valid_BT.size(1);
  const int64_t layers = std::min<int64_t>(kSetLayers, window.source_layer + 1);
  const auto newest = [&](const at::Tensor& ids_BTL) {
    return ids_BTL.squeeze(0).narrow(1, window.source_layer + 1 - layers, layers);
  };
  at::Tensor ids_TLK = newest(window.experts_BTL).unsqueeze(2);
  if (window.others_BTLK.defined()) {
    ids_TLK = at::cat({ids_TLK, newest(window.others_BTLK)}, 2);
  }
  return at::zeros({T, layers, E + 1})
      .scatter(2, ids_TLK, 1)
      .narrow(2, 0, E)
      .reshape({T, -1});
}

Samples Gather(TraceDataset* dataset, SplitPart part, Stack stack, int source,
               int64_t most, uint64_t seed) {
  const MoeGeometry& g = dataset->geometry();
  const int leads = NumLeadsOf(g, stack, source);
  const WithHidden with = dataset->any_hidden() ? WithHidden::kYes : WithHidden::kNo;
  const auto sequences = dataset->Select(part, stack, with);
  std::vector<at::Tensor> vectors, labels;
  if (sequences.empty()) return {};
  const Permutation order(sequences.size(), Mix(seed, kStream));
  int64_t count = 0;
  for (uint64_t i = 0; i < sequences.size() && count < most; ++i) {
    const uint32_t sequence = sequences[order(i)];
    const auto trace = dataset->Read({&sequence, 1}, with)[0];
    const RoutingWindow window =
        WindowOf(*trace, stack, source, g.num_experts, g.experts_per_token);
    const WindowTargets targets =
        WindowTargetsOf({trace.get()}, stack, source, leads, g.experts_per_token);
    at::Tensor chosen = targets.labels_BTH.unsqueeze(3);
    if (targets.others_BTHK.defined()) chosen = at::cat({chosen, targets.others_BTHK}, 3);
    vectors.push_back(with == WithHidden::kYes ? window.hidden_BTD.squeeze(0)
                                               : SetVectors(window));
    labels.push_back(chosen.squeeze(0));
    count += vectors.back().size(0);
  }
  return {at::cat(vectors), at::cat(labels)};
}

// Rows of one lead that have a label, at most `most`.
at::Tensor RowsOf(const Samples& samples, int64_t lead, int64_t most) {
  const auto rows =
      samples.labels_NHK.select(1, lead).select(1, 0).ge(0).nonzero().squeeze(1);
  return rows.narrow(0, 0, std::min(most, rows.size(0)));
}

// Of each test vector the places of its nearest train vectors, the nearest first.
at::Tensor NearestOf(const at::Tensor& train_ND, const at::Tensor& test_ND) {
  // |a - b|^2 without |a|^2, which is the same for all neighbours of a.
  const auto distance =
      train_ND.square().sum(1).unsqueeze(0) - 2 * at::mm(test_ND, train_ND.t());
  return std::get<1>(distance.topk(std::min(kNeighbours, train_ND.size(0)), 1,
                                   /*largest=*/false, /*sorted=*/true));
}

// [K]: share of the rows whose k-th choice is among `guess_NK`.
std::vector<double> RecallByChoice(const at::Tensor& guess_NK,
                                   const at::Tensor& truth_NK) {
  const auto hits = truth_NK.unsqueeze(2).eq(guess_NK.unsqueeze(1)).any(2);
  const auto shares = hits.to(at::kDouble).mean(0);
  return {shares.data_ptr<double>(), shares.data_ptr<double>() + shares.numel()};
}

double Mean(const std::vector<double>& values) {
  double sum = 0;
  for (const double v : values) sum += v;
  return sum / static_cast<double>(values.size());
}

// Two draws from the same vector share r = sum_e p_e^2 / K experts, p_e the probability
// that e is among the K. The best answer is the K experts with the largest p: it holds
// a = sum of them / K. For a given a, r is least where those are all a and the others
// are all alike, so r >= a^2 + K (1 - a)^2 / (E - K), which is solved for a. The solution
// is concave in r: a mean of r over vectors bounds the mean of a.
double BoundOf(double r, double K, double E) {
  const double chance = K / E;
  if (K >= E || r <= chance) return 1;
  return std::min(1.0, chance + std::sqrt((r - chance) * (1 - chance)));
}

KnnEstimate Score(const at::Tensor& nearest, const at::Tensor& train_labels_NK,
                  const at::Tensor& test_labels_NK, int num_experts) {
  KnnEstimate estimate;
  estimate.neighbours = train_labels_NK.size(0);
  estimate.samples = test_labels_NK.size(0);
  if (estimate.neighbours == 0 || estimate.samples == 0) return estimate;
  const int64_t N = estimate.samples, K = test_labels_NK.size(1);
  const auto labels =
      train_labels_NK.index_select(0, nearest.flatten()).view({N, nearest.size(1), K});
  estimate.nearest_by_choice = RecallByChoice(labels.select(1, 0), test_labels_NK);
  const auto all = labels.flatten(1);
  const auto votes =
      at::zeros({N, num_experts}).scatter_add(1, all, at::ones(all.sizes()));
  const auto commonest =
      std::get<1>(votes.sort(/*stable=*/true, 1, /*descending=*/true)).narrow(1, 0, K);
  estimate.of_32_by_choice = RecallByChoice(commonest, test_labels_NK);
  estimate.recall_nearest = Mean(estimate.nearest_by_choice);
  estimate.recall_of_32 = Mean(estimate.of_32_by_choice);
  estimate.bayes_bound =
      BoundOf(estimate.recall_nearest, static_cast<double>(K), num_experts);
  return estimate;
}

}  // namespace

KnnEstimate ByNeighbours(const at::Tensor& train_ND, const at::Tensor& train_labels_NK,
                         const at::Tensor& test_ND, const at::Tensor& test_labels_NK,
                         int num_experts) {
  if (train_ND.size(0) == 0) return {};
  return Score(NearestOf(train_ND, test_ND), train_labels_NK, test_labels_NK,
               num_experts);
}

Json KnnEstimate::ToJson() const {
  Json json = {{"phase", StackName(phase)},
               {"layer", layer},
               {"lead", lead},
               {"features", features},
               {"bayes_bound", bayes_bound},
               {"neighbours", neighbours},
               {"samples", samples}};
  const bool sets = nearest_by_choice.size() > 1;
  json[sets ? "recall_nearest" : "top1_nearest"] = recall_nearest;
  json[sets ? "recall_of_32" : "top1_of_32"] = recall_of_32;
  if (!sets) return json;
  json["recall_nearest_by_choice"] = nearest_by_choice;
  json["recall_of_32_by_choice"] = of_32_by_choice;
  return json;
}

std::vector<KnnEstimate> EstimateByNeighbours(TraceDataset* dataset, uint64_t seed,
                                              RankInfo rank, int64_t most_neighbours,
                                              int64_t most_samples) {
  const c10::NoGradGuard no_grad;
  std::vector<KnnEstimate> estimates;
  const MoeGeometry& g = dataset->geometry();
  int place = 0;
  for (const Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
    const int last = g.layers(stack) - (stack == Stack::kEncoder ? 1 : 0);
    for (int source = 0; source < last; ++source) {
      if (place++ % rank.world != rank.rank) continue;
      if (StopRequested()) return estimates;
      const Samples train =
          Gather(dataset, SplitPart::kTrain, stack, source, most_neighbours, seed);
      const Samples test =
          Gather(dataset, SplitPart::kTest, stack, source, most_samples, seed);
      if (!train.vectors_ND.defined() || !test.vectors_ND.defined()) continue;
      at::Tensor a, b, nearest;  // of the lead before: most leads have the same rows
      for (int64_t lead = 0; lead < train.labels_NHK.size(1); ++lead) {
        const auto a_rows = RowsOf(train, lead, most_neighbours);
        const auto b_rows = RowsOf(test, lead, most_samples);
        if (!nearest.defined() || !at::equal(a, a_rows) || !at::equal(b, b_rows)) {
          a = a_rows;
          b = b_rows;
          nearest = a.size(0) == 0 ? at::Tensor()
                                   : NearestOf(train.vectors_ND.index_select(0, a),
                                               test.vectors_ND.index_select(0, b));
        }
        KnnEstimate estimate =
            Score(nearest, train.labels_NHK.select(1, lead).index_select(0, a),
                  test.labels_NHK.select(1, lead).index_select(0, b), g.num_experts);
        if (estimate.neighbours == 0 || estimate.samples == 0) continue;  // no 0 % either
        estimate.phase = stack;
        estimate.layer = source;
        estimate.lead = static_cast<int>(lead) + 1;
        estimate.features = dataset->any_hidden() ? "router inputs" : "experts";
        estimates.push_back(estimate);
      }
    }
  }
  return estimates;
}

std::vector<Json> NeighboursJson(TraceDataset* dataset, uint64_t seed,
                                 Communicator* comm) {
  Json mine = Json::array();
  for (const KnnEstimate& e : EstimateByNeighbours(dataset, seed, comm->rank_info())) {
    mine.push_back(e.ToJson());
  }
  ThrowIfAnyStopped(comm, "before it was scored");
  std::vector<Json> all;
  for (const std::string& part : comm->AllGather(mine.dump())) {
    for (const Json& e : Json::parse(part)) all.push_back(e);
  }
  const auto place = [](const Json& e) {
    return std::pair(e["phase"] == StackName(Stack::kDecoder), e["layer"].get<int>());
  };
  std::stable_sort(all.begin(), all.end(),
                   [&](const Json& a, const Json& b) { return place(a) < place(b); });
  return all;
}

}  // namespace routecast
