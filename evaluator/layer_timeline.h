// When does a layer run next? Learned from the visits so far: which layer follows which,
// and how long the model works between two visits when it does not wait for experts.
// Thread rule: one thread at a time.
#pragma once

#include <optional>
#include <vector>

namespace routecast {

class LayerTimeline {
 public:
  explicit LayerTimeline(int num_layers);

  // A pass starts at `now` (seconds). `rested`: the model may have done nothing before
  // it, as between two requests, so that the time since the last visit is not work.
  void BeginPass(double now, bool rested);
  // `layer` starts at `now`, after the model waited `stall` seconds since the last one.
  void Begin(int layer, double now, double stall);
  int layer() const { return layer_; }   // -1 before the first
  long visit() const { return visit_; }  // counts visits of all layers, from 1
  // Visits from the present one until `layer` runs; nullopt where it is not known to
  // come.
  std::optional<int> DistanceTo(int layer) const;
  // The layer that is expected `distance` >= 1 visits ahead; -1 where unknown.
  int LayerAt(int distance) const;
  // The layer that followed `layer` last; -1 where unknown.
  int After(int layer) const { return next_[static_cast<size_t>(layer)]; }
  // When the visit `distance` >= 1 ahead starts where the model waits for `stall` seconds
  // since the present one's start: from then on, or from the begin of the pass that has
  // begun since.
  double StartOf(int distance, double stall) const;
  double visit_start() const { return start_; }

 private:
  std::vector<int> next_;  // layer -> the layer that followed it last
  std::vector<double>
      seconds_;  // layer -> work from its start to the next layer's, smoothed
  std::vector<double>
      lead_in_;  // layer -> work from its pass' begin to it; -1: not first
  int layer_ = -1;
  long visit_ = 0;
  double start_ = 0;
  double pass_start_ = 0;  // of the pass that has begun since the present visit
  bool pass_begun_ = false, rested_ = false;
};

}  // namespace routecast
