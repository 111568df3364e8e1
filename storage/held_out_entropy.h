// How many bits an expert id still holds for somebody who knows the token id and the
// expert of the layer before (of ids without token ids: the layer's expert of the token
// before in the token id's place): what a context coder is held against. A plug-in
// estimate of contexts that come a few times each reads far too low; this one is of
// documents that the model has not seen, each fold's by a model of the others, so it
// reads high if anything. Thread rule: one thread. Memory: the added ids twice, and the
// model's training.
#pragma once

#include <vector>

#include "common/routing.h"
#include "storage/context_trainer.h"

namespace routecast {

class HeldOutEntropy {
 public:
  static constexpr int kFolds = 5;

  explicit HeldOutEntropy(const MoeGeometry& geometry) : geometry_(geometry) {}
  // Documents go to folds by their group, so that near-duplicates stay together.
  void Add(const RoutingTrace& trace);
  // Bits an id, by global layer; negative for layers without ids or without ids of other
  // folds, and for all where a model of them would be larger than a coder's may be.
  std::vector<double> Bits(const WorkObserver& on_work = {}) const;

 private:
  std::vector<double> Estimate(const WorkObserver& on_work) const;
  static int FoldOf(const RoutingTrace& trace);
  // Whether other folds than this one have tokens of the stack: of those alone something
  // is known about it.
  bool HasOthers(int fold, Stack s) const;
  // A model of all folds but this one.
  ContextModel ModelWithout(int fold, const WorkObserver& on_work) const;

  MoeGeometry geometry_;
  std::vector<RoutingTrace> traces_;  // tokens and ids only
};

}  // namespace routecast
