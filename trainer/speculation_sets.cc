#include "trainer/speculation_sets.h"

#include <ATen/ATen.h>

#include <cmath>
#include <limits>

namespace routecast {
namespace {

constexpr double kLargest = 1 - 1e-6;
constexpr double kWider = 1.3;
constexpr int kLengths[] = {0, 16, 64, 128, std::numeric_limits<int>::max()};  // 0 = all
enum Value {
  kRecall,
  kPrecision,
  kSize,
  kTrueSize,
  kFrequencyRecall,
  kWiderRecall,
  kWiderFrequencyRecall,
  kSequences
};

}  // namespace

at::Tensor LogUnneeded(const at::Tensor& probs_BTHE, const at::Tensor& counts_BTH,
                       int64_t choices) {
  const auto counts = counts_BTH.unsqueeze(3).to(at::kFloat);
  const auto taken = (probs_BTHE * static_cast<double>(choices)).clamp_max(kLargest);
  return (at::log1p(-taken) * counts).sum(1);
}

at::Tensor NeededExperts(const at::Tensor& labels_BTHK, int64_t num_experts) {
  const int64_t B = labels_BTHK.size(0), H = labels_BTHK.size(2);
  const auto ids = at::where(labels_BTHK.ge(0), labels_BTHK, num_experts);
  const auto needed =
      at::zeros({B, H, num_experts + 1}, labels_BTHK.options().dtype(at::kFloat));
  return needed.scatter(2, ids.permute({0, 2, 1, 3}).flatten(2), 1)
      .narrow(2, 0, num_experts);
}

at::Tensor SetLoss(const at::Tensor& logits_BTHE, const at::Tensor& labels_BTHK) {
  const auto counts = labels_BTHK.select(3, 0).ge(0);
  const auto unneeded =
      LogUnneeded(at::softmax(logits_BTHE, -1), counts, labels_BTHK.size(3))
          .clamp_max(-1e-6);
  const auto needed = NeededExperts(labels_BTHK, logits_BTHE.size(3));
  const auto loss = needed * at::log(-at::expm1(unneeded)) + (1 - needed) * unneeded;
  return -(loss.mean(2) * counts.sum(1).to(at::kFloat)).sum();
}

Json SetScores::ToJson() const {
  Json json{{"phase", "encoder"},
            {"layer", layer},
            {"lead", lead},
            {"recall", recall},
            {"precision", precision},
            {"size", size},
            {"true_size", true_size},
            {"frequency_recall", frequency_recall},
            {"recall_at_1_3", wider_recall},
            {"frequency_recall_at_1_3", wider_frequency_recall},
            {"sequences", sequences}};
  const bool longest = most_tokens == std::numeric_limits<int>::max();
  if (most_tokens > 0) json["most_tokens"] = longest ? Json() : Json(most_tokens);
  for (const SetScores& part : by_tokens) json["by_tokens"].push_back(part.ToJson());
  return json;
}

void SetAccumulator::Add(int layer, const at::Tensor& probs_BTHE,
                         const at::Tensor& labels_BTHK, const at::Tensor& frequency_HE) {
  const int64_t E = probs_BTHE.size(3);
  const auto counts = labels_BTHK.select(3, 0).ge(0);
  const auto likely =
      -at::expm1(LogUnneeded(probs_BTHE, counts, labels_BTHK.size(3)));  // [B,H,E]
  const auto needed = NeededExperts(labels_BTHK, E);
  const auto budget = likely.sum(2).ceil().clamp(1, static_cast<double>(E));
  // Rank of each expert from 0; the set is those below the budget.
  const auto taken = [&](const at::Tensor& score, const at::Tensor& budget_BH) {
    const auto order = score.argsort(/*stable=*/true, 2, /*descending=*/true);
    return order.argsort(/*stable=*/true, 2, false)
        .lt(budget_BH.unsqueeze(2))
        .to(at::kFloat);
  };
  const auto counts_HE = frequency_HE.unsqueeze(0).expand_as(likely);
  const auto ours = taken(likely, budget), frequent = taken(counts_HE, budget);
  const auto wider = (needed.sum(2).to(at::kDouble) * kWider).floor();
  const auto ours_wider = taken(likely, wider), frequent_wider = taken(counts_HE, wider);
  for (int64_t b = 0; b < likely.size(0); ++b) {
    for (int64_t h = 0; h < likely.size(1); ++h) {
      const auto truth = needed[b][h];
      const double size = truth.sum().item<double>();
      if (size == 0) continue;
      const auto hits_of = [&](const at::Tensor& set_BHE) {
        return (set_BHE[b][h] * truth).sum().item<double>();
      };
      const double hits = hits_of(ours);
      const double held = budget[b][h].item<double>();
      const std::array<double, kValues> values = {hits / size,
                                                  hits / held,
                                                  held,
                                                  size,
                                                  hits_of(frequent) / size,
                                                  hits_of(ours_wider) / size,
                                                  hits_of(frequent_wider) / size,
                                                  1};
      const auto tokens = counts[b].select(1, h).sum().item<int64_t>();
      size_t length = 1;
      while (tokens > kLengths[length]) ++length;
      for (const size_t l : {size_t{0}, length}) {
        auto& sums = sums_[{layer, static_cast<int>(h) + 1, l}];
        for (size_t v = 0; v < values.size(); ++v) sums[v] += values[v];
      }
    }
  }
}

std::vector<double> SetAccumulator::Sums(int layers) const {
  std::vector<double> all;
  for (int layer = -1; layer < layers - 1; ++layer) {
    for (int lead = 1; lead <= layers - 1 - layer; ++lead) {
      for (size_t length = 0; length < std::size(kLengths); ++length) {
        const auto it = sums_.find({layer, lead, length});
        const auto values =
            it == sums_.end() ? std::array<double, kValues>{} : it->second;
        all.insert(all.end(), values.begin(), values.end());
      }
    }
  }
  return all;
}

std::vector<SetScores> SetAccumulator::Scores(const std::vector<double>& sums,
                                              int layers) {
  std::vector<SetScores> scores;
  const double* at = sums.data();
  for (int layer = -1; layer < layers - 1; ++layer) {
    for (int lead = 1; lead <= layers - 1 - layer; ++lead) {
      for (const int length : kLengths) {
        const double n = at[kSequences];
        const SetScores means = {layer,
                                 lead,
                                 at[kRecall] / n,
                                 at[kPrecision] / n,
                                 at[kSize] / n,
                                 at[kTrueSize] / n,
                                 at[kFrequencyRecall] / n,
                                 at[kWiderRecall] / n,
                                 at[kWiderFrequencyRecall] / n,
                                 static_cast<int64_t>(n),
                                 length};
        at += kValues;
        if (n == 0) continue;
        (length == 0 ? scores : scores.back().by_tokens).push_back(means);
      }
    }
  }
  return scores;
}

}  // namespace routecast
