#include "evaluator/layer_timeline.h"

#include <algorithm>

namespace routecast {
namespace {
constexpr double kSmoothing = 0.2;  // share of the newest visit

void Learn(double* mean, double value) {
  value = std::max(0.0, value);
  *mean = *mean < 0 ? value : *mean + kSmoothing * (value - *mean);
}
}  // namespace

LayerTimeline::LayerTimeline(int num_layers)
    : next_(num_layers, -1), seconds_(num_layers, -1), lead_in_(num_layers, -1) {}

void LayerTimeline::BeginPass(double now, bool rested) {
  pass_start_ = now;
  pass_begun_ = true;
  rested_ = rested;
}

void LayerTimeline::Begin(int layer, double now, double stall) {
  if (layer_ >= 0) {
    if (!pass_begun_ || !rested_) Learn(&seconds_[layer_], now - start_ - stall);
    next_[layer_] = layer;
  }
  if (pass_begun_) Learn(&lead_in_[layer], now - pass_start_);
  pass_begun_ = false;
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

double LayerTimeline::StartOf(int distance, double stall) const {
  int layer = layer_;
  double at = start_ + stall;
  for (int i = 0; i < distance && layer >= 0; ++i) {
    const int next = next_[layer];
    if (i == 0 && pass_begun_) {
      at = pass_start_ + (next < 0 ? 0.0 : std::max(0.0, lead_in_[next]));
    } else {
      at += std::max(0.0, seconds_[layer]);
    }
    layer = next;
  }
  return at;
}

}  // namespace routecast
