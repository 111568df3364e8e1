// What router inputs could tell at best: nearest neighbours among train vectors, and the
// bound that they put on any predictor of the same features (Cover, Hart 1967).
// Asymptotic in the number of vectors: an orientation, not a ceiling that was proved.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "trainer/trace_dataset.h"

namespace routecast {

struct KnnEstimate {
  Stack phase = Stack::kEncoder;
  int layer = 0, lead = 0;
  double top1_nearest = 0;  // of the nearest neighbour's expert
  double top1_of_32 = 0;    // of the commonest among the nearest 32
  // 1 - (E-1)/E (1 - sqrt(1 - E/(E-1) e)), e the nearest neighbour's error; 1 where e is
  // so large that the formula says nothing.
  double bayes_bound = 1;
  int64_t neighbours = 0, samples = 0;
  Json ToJson() const;
};

// Every (stack, source layer with a router input, lead). At most so many train vectors
// and test tokens a place, drawn by `seed`. Empty where the store has no router inputs.
std::vector<KnnEstimate> EstimateByNeighbours(TraceDataset* dataset, uint64_t seed,
                                              int64_t most_neighbours = 8192,
                                              int64_t most_samples = 1024);

// Exposed for tests. vectors [N,D], labels int64 [N] of both sides.
KnnEstimate ByNeighbours(const at::Tensor& train_ND, const at::Tensor& train_labels,
                         const at::Tensor& test_ND, const at::Tensor& test_labels,
                         int num_experts);

}  // namespace routecast
