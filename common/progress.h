// Progress with rate and ETA: a rewritten line on a terminal, a plain line every few
// seconds otherwise. Writes to stderr. Thread rule: one thread at a time.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>

namespace routecast {

// "12.0/s", "4.0/min", "1.5/h": what is slow by the longer time.
std::string RateText(double per_second);

class Progress {
 public:
  // `unit` is what is counted ("sequences", "steps"); silent when quiet.
  Progress(std::string what, std::string unit, uint64_t total, bool quiet);
  ~Progress();  // ends the line
  // `done` in units since the start; `note` is free text (loss, hit rate). `work`: the
  // share of all work that is done, 0 to 1, where units are not equally much.
  void Update(uint64_t done, const std::string& note = "",
              std::optional<double> work = {});
  void Finish(const std::string& note = "");
  double seconds() const;
  // Units a second since the first Update: what a resumed run had before does not count.
  double Rate(uint64_t done) const;
  // As of the last Update; nothing while none of the work is done.
  std::optional<double> SecondsLeft() const;

 private:
  void Print(uint64_t done, const std::string& note, bool last);
  std::string what_, unit_;
  uint64_t total_, first_ = 0;
  double first_work_ = 0, work_ = 0;
  bool quiet_, terminal_, started_ = false, finished_ = false;
  std::chrono::steady_clock::time_point start_, printed_;
};

}  // namespace routecast
