// Progress with rate and ETA: a rewritten line on a terminal, a plain line every few
// seconds otherwise. Writes to stderr. Thread rule: one thread at a time.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <optional>
#include <string>

namespace routecast {

// "12.0/s", "4.0/min", "1.5/h": what is slow by the longer time.
std::string RateText(double per_second);

class Progress {
 public:
  using Time = std::chrono::steady_clock::time_point;
  // `unit` is what is counted ("sequences", "steps"); silent when quiet. `now` is for tests.
  Progress(std::string what, std::string unit, uint64_t total, bool quiet,
           std::function<Time()> now = std::chrono::steady_clock::now);
  ~Progress();  // ends the line
  // `done` in units since the start; `note` is free text (loss, hit rate). `work`: the
  // share of all work that is done, 0 to 1, where units are not equally much.
  void Update(uint64_t done, const std::string& note = "",
              std::optional<double> work = {});
  void Finish(const std::string& note = "");
  double seconds() const;
  // Units a second since the first Update: what a resumed run had before does not count.
  double Rate(uint64_t done) const;
  // By the newest half minute, or the newest eight steps where these took longer: a pause,
  // or a phase that was slower, is soon forgotten. Nothing while none of the work is done.
  std::optional<double> SecondsLeft() const;
  // Units a second of the same time.
  double RecentRate() const;

 private:
  struct Step {
    Time time;
    double work;
    uint64_t done;
  };
  void Remember(const Step& step);
  void Print(uint64_t done, const std::string& note, bool last);
  std::string what_, unit_;
  uint64_t total_, first_ = 0;
  bool quiet_, terminal_, started_ = false, finished_ = false;
  std::function<Time()> now_;
  Time start_, printed_;
  std::deque<Step> recent_;  // the first is what the others are counted from
};

}  // namespace routecast
