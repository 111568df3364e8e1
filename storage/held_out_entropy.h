// How many bits an expert id still holds for somebody who knows the token id and the
// expert of the layer before: what a context coder is held against. A plug-in estimate of
// contexts that come a few times each reads far too low; this one is of documents that
// the model has not seen, each fold's by a model of the others, so it reads high if
// anything.
// Thread rule: one thread. Memory: the added ids twice, and the model's training.
#pragma once

#include <vector>

#include "common/routing.h"

namespace routecast {

class HeldOutEntropy {
 public:
  explicit HeldOutEntropy(const MoeGeometry& geometry) : geometry_(geometry) {}
  // Documents go to folds by their group, so that near-duplicates stay together.
  void Add(const RoutingTrace& trace);
  // Bits an id, by global layer; negative for layers without ids.
  std::vector<double> Bits() const;

 private:
  static constexpr int kFolds = 5;
  static int FoldOf(const RoutingTrace& trace);

  MoeGeometry geometry_;
  std::vector<RoutingTrace> traces_;  // tokens and ids only
};

}  // namespace routecast
