#include "evaluator/layer_timeline.h"

#include <algorithm>

namespace routecast {
namespace {
constexpr double kSmoothing = 0.2;  // share of the newest visit
}

LayerTimeline::LayerTimeline(int num_layers)
    : next_(num_layers, -1), seconds_(num_layers, -1) {}

void LayerTimeline::Begin(int layer, double now, double stall) {
  if (layer_ >= 0) {
    const double work = std::max(0.0, now - start_ - stall);
    double& mean = seconds_[layer_];
    mean = mean < 0 ? work : mean + kSmoothing * (work - mean);
    next_[layer_] = layer;
  }
  layer_ = layer;
  start_ = now;
  ++visit_;
}

int LayerTimeline::LayerAt(int distance) const {
  int layer = layer_;
  for (int i = 0; i < distance && layer >= 0; ++i) layer = next_[layer];
  return layer;
}

std::optional<int> LayerTimeline::DistanceTo(int layer) const {
  int at = layer_;
  for (size_t distance = 1; distance <= next_.size() && at >= 0; ++distance) {
    at = next_[at];
    if (at == layer) return static_cast<int>(distance);
  }
  return std::nullopt;
}

double LayerTimeline::SecondsTo(int distance) const {
  int layer = layer_;
  double seconds = 0;
  for (int i = 0; i < distance && layer >= 0; ++i) {
    seconds += std::max(0.0, seconds_[layer]);
    layer = next_[layer];
  }
  return seconds;
}

}  // namespace routecast
