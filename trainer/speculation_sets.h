// The encoder's question: which experts does a layer need for all tokens of a sequence?
// An expert is needed where one token needs it: P(e) = 1 - prod over tokens (1 - p_te).
// B sequences, T tokens, H leads, E experts, K experts a token.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <map>
#include <tuple>
#include <vector>

#include "common/routing.h"
#include "common/run_record.h"

namespace routecast {

// log(1 - P(e)) [B,H,E] over the tokens that `counts_BTH` says, with p <= 1 - 1e-6. Where
// a token takes several experts (`choices`), p is so many times as large.
at::Tensor LogUnneeded(const at::Tensor& probs_BTHE, const at::Tensor& counts_BTH,
                       int64_t choices = 1);
// The experts of the labels (-100 = none), as 0 and 1. [B,H,E] float32.
at::Tensor NeededExperts(const at::Tensor& labels_BTHK, int64_t num_experts);
// Binary cross-entropy of P(e) against the true set, a mean over experts, times the
// sequence's labels, so that it weighs like the loss of as many tokens; summed.
at::Tensor SetLoss(const at::Tensor& logits_BTHE, const at::Tensor& labels_BTHK);

// Scores of ranked sets over sequences, one a (source layer, lead) of the encoder.
// The predicted set holds the ceil(sum P) experts of the largest P.
struct SetScores {
  int layer = 0, lead = 0;
  double recall = 0;  // of the true set, mean over sequences
  double precision = 0;
  double size = 0, true_size = 0;  // means
  double frequency_recall = 0;  // of as many experts, ranked by the train part's counts
  // Both of floor(1.3 times the true set's size) experts, whatever sum P says.
  double wider_recall = 0, wider_frequency_recall = 0;
  int64_t sequences = 0;
  int most_tokens = 0;  // of sequences of so many tokens that count, at most; 0 = of all
  // The same of sequences of 1 to 16, 17 to 64, 65 to 128 and more tokens, where there
  // are some.
  std::vector<SetScores> by_tokens{};
  Json ToJson() const;
};

// Thread rule: one thread at a time.
class SetAccumulator {
 public:
  // probs [B,T,H,E] of one source layer; frequency_HE: of the leads' targets.
  void Add(int layer, const at::Tensor& probs_BTHE, const at::Tensor& labels_BTHK,
           const at::Tensor& frequency_HE);
  // Sums as numbers, for a reduction over ranks; in one order on all.
  std::vector<double> Sums(int layers) const;
  static std::vector<SetScores> Scores(const std::vector<double>& sums, int layers);

 private:
  static constexpr int kValues = 8;
  // By layer, lead and length: 0 = all, then the lengths of by_tokens.
  std::map<std::tuple<int, int, size_t>, std::array<double, kValues>> sums_;
};

}  // namespace routecast
