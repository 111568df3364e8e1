// Time as the planner and the link see it. Tests and the simulator move it by hand.
#pragma once

#include <chrono>

namespace routecast {

class Clock {
 public:
  virtual ~Clock() = default;
  virtual double Now() const = 0;  // seconds since an arbitrary start; never falls
};

class SteadyClock : public Clock {
 public:
  double Now() const override {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_)
        .count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

class ManualClock : public Clock {
 public:
  double Now() const override { return now_; }
  void AdvanceTo(double now) { now_ = now > now_ ? now : now_; }

 private:
  double now_ = 0;
};

}  // namespace routecast
