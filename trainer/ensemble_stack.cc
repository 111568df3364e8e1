#include "trainer/ensemble_stack.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <cmath>
#include <limits>
#include <map>
#include <tuple>

#include "models/ensemble_model.h"
#include "trainer/agreed_stop.h"

namespace routecast {
namespace {

constexpr int64_t kIgnore = -100;
constexpr int kMostPasses = 16;
constexpr double kSettled = 1e-4;  // change of a weight
constexpr double kPull = 1;        // towards equal weights, in labels

using Place = std::tuple<Stack, int, int>;  // stack, source, lead

// The cross-entropy of a place at its weights, with gradient and curvature: it is convex,
// so that Newton's steps, halved where one went too far, end at its least.
class Newton {
 public:
  explicit Newton(int64_t members)
      : equal_M_(at::full({members}, 1.0 / double(members), at::kDouble)),
        weights_M(equal_M_.clone()),
        best_M_(equal_M_.clone()) {}

  // Loss, labels, gradient [M] and curvature [M,M] of the rows, to be summed.
  at::Tensor Sums(const at::Tensor& logs_NME, const at::Tensor& truth_NK) const {
    const int64_t N = logs_NME.size(0), M = logs_NME.size(1), K = truth_NK.size(1);
    const auto mixed_NE = at::matmul(weights_M, logs_NME);
    const auto log_probs_NE = at::log_softmax(mixed_NE, 1);
    const auto probs = log_probs_NE.exp().unsqueeze(1);
    const auto expected_NM = (logs_NME * probs).sum(2);
    const auto true_NM =
        logs_NME.gather(2, truth_NK.unsqueeze(1).expand({N, M, K})).mean(2);
    const auto loss = -log_probs_NE.gather(1, truth_NK).mean(1).sum();
    const auto curvature = at::bmm(logs_NME * probs, logs_NME.transpose(1, 2)).sum(0) -
                           at::mm(expected_NM.t(), expected_NM);
    const auto labels = at::scalar_tensor(static_cast<double>(N), at::kDouble);
    return at::cat({loss.view(1), labels.view(1), (expected_NM - true_NM).sum(0),
                    curvature.flatten()});
  }

  // Takes the sums over all rows; false where the weights have settled.
  bool Step(const at::Tensor& sums) {
    const int64_t M = weights_M.numel();
    if (sums[1].item<double>() == 0) return false;
    const auto away = weights_M - equal_M_;
    const double loss =
        sums[0].item<double>() + kPull / 2 * away.square().sum().item<double>();
    if (!(loss <= least_)) {
      weights_M = (weights_M + best_M_) / 2;
      return true;
    }
    least_ = loss;
    best_M_ = weights_M;
    const auto gradient = sums.narrow(0, 2, M) + kPull * away;
    const auto curvature =
        sums.narrow(0, 2 + M, M * M).view({M, M}) + kPull * at::eye(M, at::kDouble);
    const auto step = at::linalg_solve(curvature, gradient);
    weights_M = weights_M - step;
    return step.abs().max().item<double>() > kSettled;
  }
  const at::Tensor& best() const { return best_M_; }

 private:
  const at::Tensor equal_M_;
  at::Tensor weights_M, best_M_;
  double least_ = std::numeric_limits<double>::infinity();
};

// Of the micro-batch's rows, into the sums of its places.
void AddSums(SpeculationModel* ensemble, const MicroBatch& micro,
             const EvaluationData& data, const std::map<Place, Newton>& places,
             std::map<Place, at::Tensor>* sums) {
  const SpeculationBatch batch = MakeSpeculationBatch(micro, data.dataset, data.hidden);
  if (batch.num_labels == 0) return;
  const auto outputs = ensemble->ForwardMembers(WindowTo(batch.window, data.device), 0);
  const at::Tensor sets = LabelSets(batch);
  for (int64_t h = 0; h < sets.size(2); ++h) {
    const at::Tensor truth = sets.select(2, h).flatten(0, 1);
    const at::Tensor rows = truth.select(1, 0).ne(kIgnore).nonzero().squeeze(1);
    if (rows.numel() == 0) continue;
    std::vector<at::Tensor> logs;
    for (const SpeculationOutput& out : outputs) {
      const at::Tensor logits = out.logits_BTHE.select(2, h).flatten(0, 1).cpu();
      logs.push_back(at::log_softmax(logits.index_select(0, rows), 1).to(at::kDouble));
    }
    const Place place{micro.stack, micro.source_layer, static_cast<int>(h) + 1};
    sums->at(place) +=
        places.at(place).Sums(at::stack(logs, 1), truth.index_select(0, rows));
  }
}

// A pass over the data at the places' weights, and a step of each; false where all have
// settled. Sums of all ranks: each takes the same steps.
bool Pass(SpeculationModel* ensemble, const EvaluationData& data, Communicator* comm,
          std::map<Place, Newton>* places) {
  const auto M = static_cast<int64_t>(ensemble->config().members.size());
  const int64_t width = 2 + M + M * M;
  std::map<Place, at::Tensor> sums;
  for (const auto& [place, newton] : *places) {
    sums[place] = at::zeros({width}, at::kDouble);
  }
  const RankInfo rank = comm->rank_info();
  for (size_t i = static_cast<size_t>(rank.rank); i < data.batches.size();
       i += static_cast<size_t>(rank.world)) {
    if (StopRequested()) break;
    AddSums(ensemble, data.batches[i], data, *places, &sums);
  }
  ThrowIfAnyStopped(comm, "before its members were weighed");
  std::vector<double> all;
  for (const auto& [place, sum] : sums) {
    const double* value = sum.const_data_ptr<double>();
    all.insert(all.end(), value, value + width);
  }
  comm->AllReduceSum(all);
  bool moving = false;
  double* next = all.data();
  for (auto& [place, newton] : *places) {
    moving = newton.Step(at::from_blob(next, {width}, at::kDouble)) || moving;
    next += width;
  }
  return moving;
}

}  // namespace

void FitStack(SpeculationModel* ensemble, const EvaluationData& data,
              Communicator* comm) {
  const c10::NoGradGuard no_grad;
  const auto members = static_cast<int64_t>(ensemble->config().members.size());
  std::map<Place, Newton> places;
  for (const MicroBatch& micro : data.batches) {
    const int leads = ensemble->NumLeads(micro.stack, micro.source_layer);
    for (int lead = 1; lead <= leads; ++lead) {
      places.try_emplace({micro.stack, micro.source_layer, lead}, members);
    }
  }
  int passes = 0;
  while (Pass(ensemble, data, comm, &places) && ++passes < kMostPasses) {
  }
  for (const auto& [place, newton] : places) {
    const auto [stack, source, lead] = place;
    StackWeights(*ensemble, stack, source, lead).copy_(newton.best());
  }
}

}  // namespace routecast
