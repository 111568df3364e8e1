// What the features of a window could tell at best: nearest neighbours among train
// vectors, and the bound that they put on any predictor of the same features.
// Asymptotic in the number of vectors: an orientation, not a ceiling that was proved.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "comm/communicator.h"
#include "trainer/trace_dataset.h"

namespace routecast {

// N vectors, K experts a token, D width, E experts.
struct KnnEstimate {
  Stack phase = Stack::kEncoder;
  int layer = 0, lead = 0;
  // What vectors are: "router inputs", or where none are recorded "experts": which of E
  // each of the token's newest four layers took.
  std::string features;
  // Share of a token's K experts that are among the K of its nearest neighbour, and among
  // the K commonest of the nearest 32; K = 1: accuracy. By choice: of the first, second
  // ..
  double recall_nearest = 0, recall_of_32 = 0;
  std::vector<double> nearest_by_choice, of_32_by_choice;
  // K/E + sqrt((r - K/E)(1 - K/E)) with r = recall_nearest; 1 where r is so small that
  // the formula says nothing. K = 1: Cover and Hart's (1967).
  double bayes_bound = 1;
  int64_t neighbours = 0, samples = 0;
  Json ToJson() const;
};

// Every (stack, source layer that has such features, lead): source layers are dealt to
// ranks, and this rank's come back. At most so many train vectors and test tokens a
// place, drawn by `seed`.
std::vector<KnnEstimate> EstimateByNeighbours(TraceDataset* dataset, uint64_t seed,
                                              RankInfo rank = {},
                                              int64_t most_neighbours = 8192,
                                              int64_t most_samples = 1024);

// The same of all ranks, which each look at their own: one alone would keep the others
// waiting. In the order of places, the encoder's first; the same on every rank.
std::vector<Json> NeighboursJson(TraceDataset* dataset, uint64_t seed,
                                 Communicator* comm);

// Exposed for tests. vectors [N,D], labels int64 [N,K] of both sides.
KnnEstimate ByNeighbours(const at::Tensor& train_ND, const at::Tensor& train_labels_NK,
                         const at::Tensor& test_ND, const at::Tensor& test_labels_NK,
                         int num_experts);

}  // namespace routecast
