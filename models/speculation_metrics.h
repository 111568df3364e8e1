// Scores of predictions, one accumulator a (phase, source layer, lead). N rows, E
// experts.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "common/routing.h"
#include "common/run_record.h"
#include "models/equal_mass_calibration.h"

namespace routecast {

inline constexpr std::array<int, 6> kScoredTopK = {1, 2, 3, 4, 5, 10};

// Of one document: right answers of how many (K > 1: experts found of K a token).
struct DocumentScore {
  uint64_t document = 0;
  int64_t right = 0, of = 0;
};

struct LeadScores {
  Stack phase = Stack::kEncoder;
  int layer = 0;  // source layer in its stack, -1 = before the first MoE layer
  int lead = 0;
  int target = 0;               // target layer in its stack (of the next token where the
                                // lead leaves the decoder)
  std::array<double, 6> top{};  // by kScoredTopK; ties go to the lower id
  double cross_entropy = 0;     // nats; probabilities below 1e-12 count as 1e-12
  double ece = 0;               // 10 equal bins of the top-1 probability, the last closed
  std::optional<double> ece_equal_mass;  // the same over bins of equal mass, if asked for
  double ci95_low = 0, ci95_high = 0;    // of top-1: bootstrap over documents
  int64_t samples = 0, documents = 0;
  std::vector<DocumentScore> by_document;  // ascending; what ci95 is of
  // Models of K > 1 experts a token; `top` is of the first choice then, cross_entropy the
  // mean over the K, ece of "the likeliest is one of the K" at K times its probability,
  // ci95 of recall.
  double recall = 0;              // of the K experts among the K likeliest
  double recall_twice = 0;        // among the 2 K likeliest
  std::vector<double> by_choice;  // recall of the first, second .. choice; empty: K = 1

  double top1() const { return top[0]; }
  double top4() const { return top[3]; }
  // phase layer lead target top1 .. top10 cross_entropy ece (ece_equal_mass) ci95 [low,
  // high] samples; K > 1: recall recall_at_2k recall_by_choice [K]
  Json ToJson() const;
};

// Thread rule: one thread at a time. Sums are kept by document, so the result does not
// depend on the order of rows beyond rounding, nor on which rank saw which document.
class LeadAccumulator {
 public:
  LeadAccumulator() = default;
  // `equal_mass`: for that error every answer is kept.
  LeadAccumulator(Stack phase, int layer, int lead, int target, bool equal_mass = false)
      : phase_(phase), layer_(layer), lead_(lead), target_(target) {
    if (equal_mass) answers_.emplace();
  }

  // probs float32 [N,E]; labels int64 [N], -100 = does not count, or all experts of a
  // token [N,K], the first choice first; documents int64 [N] (the bits of the unsigned
  // id). Any device. K <= kMostChoices, one K for all rows.
  static constexpr int kMostChoices = 16;
  void Add(const at::Tensor& probs_NE, const at::Tensor& labels,
           const at::Tensor& documents_N);
  // `rows` of a document that got no answer: wrong in every top-k, as if the label's
  // probability were 0, and without a confidence. `choices`: K of the other rows.
  void AddUnanswered(uint64_t document, int64_t rows, int64_t choices = 1);
  // Sums as bytes for another rank's Merge (same machine type). Merge throws DataError
  // where the bytes are not such sums.
  std::string Bytes() const;
  void Merge(const std::string& bytes);
  // 1,000 resamples of documents drawn by `seed`.
  LeadScores Scores(uint64_t seed = 0, int resamples = 1000) const;
  int64_t samples() const;

 private:
  struct Sums {
    int64_t samples = 0;
    std::array<int64_t, 6> hits{};
    double cross_entropy = 0;
    std::array<int64_t, 10> bin_count{}, bin_hits{};
    std::array<double, 10> bin_confidence{};
    int64_t choices = 1;  // K
    std::array<int64_t, kMostChoices> choice_hits{};
    int64_t twice_hits = 0;
  };
  Stack phase_ = Stack::kEncoder;
  int layer_ = 0, lead_ = 0, target_ = 0;
  std::map<uint64_t, Sums> documents_;
  std::optional<EqualMassCalibration> answers_;
};

}  // namespace routecast
