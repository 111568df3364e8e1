#include "evaluator/later_shares.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "evaluator/layer_forecast.h"

namespace routecast {
namespace {

// Of what is said, the rest is the use rate: chosen by planner_bench on validation
// sequences (docs/results/runtime.md).
constexpr double kSaid = 0.5;
constexpr int kTurns = 2;

}  // namespace

LaterShares::LaterShares(const ExpertCache* cache)
    : cache_(cache), layers_(static_cast<size_t>(cache->geometry().num_layers())) {}

void LaterShares::Say(int layer, long visit, std::span<const float> shares) {
  const MoeGeometry& g = cache_->geometry();
  if (shares.size() != static_cast<size_t>(g.num_experts))
    throw std::logic_error("LaterShares: a share an expert");
  std::vector<float> said(shares.begin(), shares.end());
  MakeProbabilities(&said);
  if (any_ && g.StackOf(layer) != stack_) Forget();
  any_ = true;
  stack_ = g.StackOf(layer);
  Layer& entry = layers_[static_cast<size_t>(layer)];
  entry.said = visit + 1;
  entry.rate.resize(said.size());
  for (int e = 0; e < g.num_experts; ++e) {
    entry.rate[static_cast<size_t>(e)] =
        kSaid * said[static_cast<size_t>(e)] + (1 - kSaid) * cache_->UseRate({layer, e});
  }
  entry.rising.resize(said.size());
  std::iota(entry.rising.begin(), entry.rising.end(), 0);
  std::stable_sort(entry.rising.begin(), entry.rising.end(), [&](int a, int b) {
    return entry.rate[static_cast<size_t>(a)] < entry.rate[static_cast<size_t>(b)];
  });
}

const LaterShares::Layer* LaterShares::Find(int layer, long now) const {
  const MoeGeometry& g = cache_->geometry();
  const Layer& entry = layers_[static_cast<size_t>(layer)];
  const long turns = long{kTurns} * g.layers(g.StackOf(layer));
  return entry.said > 0 && now + 1 - entry.said <= turns ? &entry : nullptr;
}

void LaterShares::Begin(int layer) {
  if (any_ && cache_->geometry().StackOf(layer) != stack_) Forget();
}

void LaterShares::Forget() {
  for (Layer& layer : layers_) layer.said = 0;
  any_ = false;
}

}  // namespace routecast
