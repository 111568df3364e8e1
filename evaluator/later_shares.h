// Which experts a layer's later visits will use, beyond the reach of forecasts: what a
// predictor said of it, beside what has been used so far. Thread rule: one thread at a
// time.
#pragma once

#include <span>
#include <vector>

#include "evaluator/expert_cache.h"

namespace routecast {

class LaterShares {
 public:
  // `cache` outlives this.
  explicit LaterShares(const ExpertCache* cache);
  struct Layer {
    std::vector<double> rate;  // by expert: share of visits that will use it
    std::vector<int> rising;   // the experts by rate, of equals the lower one first
    long said = 0;             // at this visit; 0 = nothing
  };
  // `shares` [E] as a predictor gave them: what is no number in [0, 1] is made one. They
  // are weighed with the use rates of now.
  void Say(int layer, long visit, std::span<const float> shares);
  // Null where nothing was said within the layer's last two turns.
  const Layer* Find(int layer, long now) const;
  // `layer` runs: what was said of the other stack was of another sequence.
  void Begin(int layer);
  void Forget();
  bool any() const { return any_; }  // whether anything was said since it was forgotten

 private:
  const ExpertCache* cache_;
  std::vector<Layer> layers_;
  bool any_ = false;
  Stack stack_ = Stack::kDecoder;  // of those said
};

}  // namespace routecast
