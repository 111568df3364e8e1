// How busy the link is while a stack runs: the share of the time of its last hundred
// visits or so that transfers had it. Time in which the model rests between two passes
// does not count. Thread rule: one thread at a time.
#pragma once

#include "common/routing.h"

namespace routecast {

class LinkUse {
 public:
  // A pass starts at `now` (seconds); `rested` as LayerTimeline has it.
  void BeginPass(double now, bool rested);
  // A layer of `stack` starts.
  void BeginVisit(Stack stack, double now);
  // A transfer that had the link since `began` has ended.
  void Moved(double began, double now);
  // In [0, 1]; near 1 until there is evidence.
  double Share(Stack stack) const;

 private:
  struct Account {  // fading
    double visits = 0, seconds = 0, busy = 0;
  };
  Account accounts_[2];
  Stack stack_ = Stack::kEncoder;
  double began_ = -1;   // the present visit; -1: none, or the model has rested since
  double moving_ = 0;   // seconds that transfers had in it
  double rested_ = -1;  // until when
};

}  // namespace routecast
