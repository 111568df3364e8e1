// Heads of backup experts against the router's choices: is the demanded one among them,
// and had it been lost or replaced, was the next one named? A token's answer is the
// likeliest expert of the first head, then of each backup the likeliest that is not in
// the answer yet. For comparison, as many of the first head's own likeliest. B sequences,
// T tokens, H leads, E experts, K backups.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <tuple>
#include <vector>

#include "common/run_record.h"
#include "models/speculation_model.h"
#include "trainer/speculation_batch.h"

namespace routecast {

struct BackupScores {
  Stack phase = Stack::kEncoder;
  int layer = 0, lead = 0;  // as in LeadScores
  // Of the router's second, third .. choice: share of tokens whose answer holds it.
  std::vector<double> recall, recall_primary;
  // The same of the first choice, the expert that the token demands.
  double recall_first = 0, recall_first_primary = 0;
  int64_t samples = 0;
  Json ToJson() const;
};

// Thread rule: one thread at a time.
class BackupAccumulator {
 public:
  BackupAccumulator(const MoeGeometry& geometry, int backups);
  // `output` of the batch's windows. REQUIRES the router's choices in the batch.
  void Add(const SpeculationOutput& output, const SpeculationBatch& batch);
  // Sums as numbers, for a reduction over ranks, and the scores of such sums.
  std::vector<double> Sums() const;
  std::vector<BackupScores> Scores(const std::vector<double>& sums) const;

 private:
  // The tokens; hits of each choice, the first too, by the answer; by the first head.
  size_t width() const { return 1 + 2 * (1 + static_cast<size_t>(backups_)); }
  int backups_;
  std::map<std::tuple<Stack, int, int>, std::vector<double>> sums_;  // every place
};

}  // namespace routecast
