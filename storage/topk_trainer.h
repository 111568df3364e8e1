// Makes the model of top-k ids from routing, as context_trainer.h makes that of first
// choices: layer by layer, first how experts follow the token's first one, then what each
// token (and each pair) changes about that. Counts are held against what the model so far
// expects of drawing without putting back; one step of Hunter's iteration (D. R. Hunter,
// "MM algorithms for generalized Bradley-Terry models", 2004) an entry.
// Thread rule: one thread. Memory: the ids of all spans, and about 24 bytes a token.
#pragma once

#include <string>
#include <vector>

#include "storage/context_trainer.h"
#include "storage/topk_model.h"

namespace routecast {

class TopkTrainer {
 public:
  TopkTrainer(const MoeGeometry& geometry, const TrainerOptions& options);
  // REQUIRES the geometry's layers, ids < E, one K, and token ids in all spans or in
  // none. Spans without tokens are passed over.
  void Add(Stack s, const RoutingSpan& span);
  // The model is a function of the spans and their order.
  TopkModel Train(const std::string& where) const;

 private:
  StackTables TrainStack(Stack s) const;

  MoeGeometry geometry_;
  TrainerOptions options_;
  std::vector<RoutingSpan> spans_[2];  // ids alone
};

}  // namespace routecast
