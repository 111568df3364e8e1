// What was said of the visits to come: the planner's short memory of predictions, one
// entry a visit ahead, whose memory is used again. Thread rule: one thread at a time.
#pragma once

#include <algorithm>
#include <bit>
#include <span>
#include <vector>

#include "evaluator/layer_forecast.h"

namespace routecast {

// A candidate, as it was said `lead` visits ahead: to be judged when its visit comes.
struct SaidExpert {
  int lead = 0;
  ForetoldExpert expert;
};

// What was said of one visit.
struct VisitForecast {
  long visit = 0;  // 0: nothing was said
  int layer = 0;
  int lead = 0;                          // when what stands here was said
  bool trusted = true;                   // false: as if nothing had been said
  std::span<const float> probabilities;  // of use, by expert; in [0, 1]
  // Some of them, the likeliest ones, where they are near at hand; else nothing.
  std::span<const ForetoldExpert> likeliest;
  std::vector<ForetoldExpert> ranked;  // candidates, best first
  std::vector<SaidExpert> said;        // of all leads
  std::vector<float> kept;  // where `probabilities` points, unless somebody keeps them
  // A number of `probabilities`, which may be far away: a recording is larger than the
  // caches.
  float ProbabilityOf(int expert) const {
    for (const ForetoldExpert& e : likeliest) {
      if (e.expert == expert) return e.probability;
    }
    return probabilities[static_cast<size_t>(expert)];
  }
};

class VisitForecasts {
 public:
  // Of visits up to `max_lead` ahead of the present one.
  explicit VisitForecasts(int max_lead)
      : max_lead_(std::max(max_lead, 0)),
        entries_(std::bit_ceil(static_cast<size_t>(max_lead_) + 1)) {}
  int max_lead() const { return max_lead_; }
  // The entry of a visit, with what was said of it before, or of one long past. REQUIRES
  // now < visit <= now + max_lead().
  VisitForecast& Say(long visit) {
    last_ = std::max(last_, visit);
    VisitForecast& entry = At(visit);
    if (entry.visit != visit) entry.said.clear();
    entry.visit = visit;
    return entry;
  }
  // Null where nothing was said. REQUIRES as above.
  const VisitForecast* Find(long visit) const {
    const VisitForecast& entry = At(visit);
    return entry.visit == visit ? &entry : nullptr;
  }
  VisitForecast* Find(long visit) {
    VisitForecast& entry = At(visit);
    return entry.visit == visit ? &entry : nullptr;
  }
  // Whether anything was said of a visit after `now`.
  bool AnyAfter(long now) const { return last_ > now; }
  void Forget() {
    for (VisitForecast& entry : entries_) entry.visit = 0;
    last_ = 0;
  }

 private:
  VisitForecast& At(long visit) {
    return entries_[static_cast<size_t>(visit) & (entries_.size() - 1)];
  }
  const VisitForecast& At(long visit) const {
    return entries_[static_cast<size_t>(visit) & (entries_.size() - 1)];
  }
  int max_lead_;
  std::vector<VisitForecast> entries_;  // visit v at v % size, a power of two
  long last_ = 0;                       // the farthest visit of which something was said
};

}  // namespace routecast
