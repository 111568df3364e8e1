#include "trainer/speculation_backups.h"

#include <ATen/ATen.h>

#include <algorithm>

namespace routecast {
namespace {

// The likeliest of `scores` that is not in `taken`; ties go to the lower id.
int64_t Likeliest(const float* scores, int64_t experts,
                  const std::vector<int64_t>& taken) {
  int64_t best = -1;
  for (int64_t e = 0; e < experts; ++e) {
    if (best >= 0 && scores[e] <= scores[best]) continue;
    if (std::find(taken.begin(), taken.end(), e) == taken.end()) best = e;
  }
  return best;
}

at::Tensor OnHost(const at::Tensor& x) {
  return x.detach().to(at::kCPU, at::kFloat).contiguous();
}

}  // namespace

Json BackupScores::ToJson() const {
  return {{"phase", StackName(phase)},
          {"layer", layer},
          {"lead", lead},
          {"recall", recall},
          {"samples", samples},
          {"recall_primary", recall_primary},
          {"recall_first", recall_first},
          {"recall_first_primary", recall_first_primary}};
}

BackupAccumulator::BackupAccumulator(const MoeGeometry& geometry, int backups)
    : backups_(backups) {
  for (const Stack stack : {Stack::kEncoder, Stack::kDecoder}) {
    for (int source = -1; source < geometry.layers(stack); ++source) {
      for (int lead = 1; lead <= NumLeadsOf(geometry, stack, source); ++lead) {
        sums_[{stack, source, lead}].assign(width(), 0);
      }
    }
  }
}

void BackupAccumulator::Add(const SpeculationOutput& output,
                            const SpeculationBatch& batch) {
  const at::Tensor first = OnHost(output.logits_BTHE);
  const at::Tensor further = OnHost(output.backups_BTHKE);
  const at::Tensor labels = batch.labels_BTH.contiguous();
  const at::Tensor choices = batch.teacher_ids_BTHK.contiguous();
  const int64_t H = labels.size(2), E = first.size(3), K = backups_;
  const int64_t recorded = choices.size(3);
  for (int64_t row = 0; row < labels.numel(); ++row) {
    if (labels.data_ptr<int64_t>()[row] < 0) continue;
    const int64_t* chosen = choices.data_ptr<int64_t>() + row * recorded;
    const float* primary = first.data_ptr<float>() + row * E;
    const float* backup = further.data_ptr<float>() + row * K * E;
    std::vector<int64_t> answer{Likeliest(primary, E, {})}, own = answer;
    for (int64_t k = 0; k < K; ++k) {
      answer.push_back(Likeliest(backup + k * E, E, answer));
      own.push_back(Likeliest(primary, E, own));
    }
    auto& sums = sums_.at(
        {batch.window.stack, batch.window.source_layer, static_cast<int>(row % H) + 1});
    sums[0] += 1;
    for (int64_t k = 0; k <= K; ++k) {
      // Where probabilities tie, the recorded order need not begin with the label.
      const int64_t wanted = k == 0 ? labels.data_ptr<int64_t>()[row] : chosen[k];
      const auto holds = [&](const std::vector<int64_t>& all) {
        return std::find(all.begin(), all.end(), wanted) != all.end();
      };
      sums[static_cast<size_t>(1 + k)] += holds(answer);
      sums[static_cast<size_t>(2 + K + k)] += holds(own);
    }
  }
}

std::vector<double> BackupAccumulator::Sums() const {
  std::vector<double> all;
  for (const auto& [place, sums] : sums_) all.insert(all.end(), sums.begin(), sums.end());
  return all;
}

std::vector<BackupScores> BackupAccumulator::Scores(
    const std::vector<double>& sums) const {
  std::vector<BackupScores> scores;
  const double* at = sums.data();
  for (const auto& [place, unused] : sums_) {
    const double n = at[0];
    const auto shares = [&](int first) {
      std::vector<double> all;
      for (int k = 0; k < backups_; ++k) all.push_back(at[first + k] / n);
      return all;
    };
    const auto& [stack, layer, lead] = place;
    if (n > 0) {
      scores.push_back({stack, layer, lead, shares(2), shares(3 + backups_), at[1] / n,
                        at[2 + backups_] / n, static_cast<int64_t>(n)});
    }
    at += width();
  }
  return scores;
}

}  // namespace routecast
