#include "common/progress.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>

namespace routecast {
namespace {
constexpr auto kTerminalInterval = std::chrono::milliseconds(200);
constexpr auto kPlainInterval = std::chrono::seconds(5);
constexpr auto kRecent = std::chrono::seconds(30);
constexpr auto kStepInterval = std::chrono::milliseconds(250);  // bounds what is kept
constexpr size_t kRecentSteps = 8;

double SecondsOf(std::chrono::steady_clock::duration time) {
  return std::max(std::chrono::duration<double>(time).count(), 1e-9);
}

std::string Duration(double seconds) {
  char text[32];
  const int s = static_cast<int>(seconds + 0.5);
  if (s >= 3600) {
    std::snprintf(text, sizeof text, "%dh%02dm", s / 3600, s / 60 % 60);
  } else if (s >= 60) {
    std::snprintf(text, sizeof text, "%dm%02ds", s / 60, s % 60);
  } else {
    std::snprintf(text, sizeof text, "%ds", s);
  }
  return text;
}
}  // namespace

std::string RateText(double per_second) {
  const bool minutes = per_second > 0 && per_second < .1;
  const bool hours = minutes && per_second * 60 < .1;
  char text[64];
  std::snprintf(text, sizeof text, "%.1f/%s",
                per_second * (hours     ? 3600
                              : minutes ? 60
                                        : 1),
                hours     ? "h"
                : minutes ? "min"
                          : "s");
  return text;
}

Progress::Progress(std::string what, std::string unit, uint64_t total, bool quiet,
                   std::function<Time()> now)
    : what_(std::move(what)),
      unit_(std::move(unit)),
      total_(total),
      quiet_(quiet),
      terminal_(::isatty(STDERR_FILENO) == 1),
      now_(std::move(now)),
      start_(now_()),
      printed_(start_) {}

Progress::~Progress() {
  if (!quiet_ && terminal_ && started_ && !finished_) std::fputc('\n', stderr);
}

double Progress::seconds() const {
  return std::chrono::duration<double>(now_() - start_).count();
}

double Progress::Rate(uint64_t done) const {
  return static_cast<double>(done - std::min(done, first_)) / std::max(seconds(), 1e-9);
}

double Progress::RecentRate() const {
  if (recent_.size() < 2) return 0;
  const Step &from = recent_.front(), &to = recent_.back();
  return static_cast<double>(to.done - from.done) / SecondsOf(now_() - from.time);
}

std::optional<double> Progress::SecondsLeft() const {
  if (recent_.size() < 2) return std::nullopt;
  const Step &from = recent_.front(), &to = recent_.back();
  const double rate = (to.work - from.work) / SecondsOf(now_() - from.time);
  if (rate <= 0) return std::nullopt;
  return (1 - std::min(to.work, 1.0)) / rate;
}

// Only what moves the work is a step: many updates may come within one.
void Progress::Remember(const Step& step) {
  if (step.work <= recent_.back().work) return;
  const size_t n = recent_.size();
  // The last step grows until it is long enough to be one.
  if (n > 2 && step.time - recent_[n - 2].time < kStepInterval) {
    recent_.back() = step;
  } else {
    recent_.push_back(step);
  }
  while (recent_.size() > kRecentSteps + 1 && step.time - recent_[1].time >= kRecent) {
    recent_.pop_front();
  }
}

void Progress::Update(uint64_t done, const std::string& note,
                      std::optional<double> work) {
  const double share =
      work.value_or(static_cast<double>(done) /
                    static_cast<double>(std::max<uint64_t>(total_, 1)));
  const Time now = now_();
  if (!started_) {
    started_ = true;
    first_ = done;
    recent_ = {{start_, share, done}};
  }
  Remember({now, share, done});
  if (quiet_) return;
  const bool due =
      terminal_ ? now - printed_ >= kTerminalInterval : now - printed_ >= kPlainInterval;
  if (!due) return;
  printed_ = now;
  Print(done, note, false);
}

void Progress::Finish(const std::string& note) {
  if (quiet_ || finished_) return;
  finished_ = true;
  started_ = true;
  Print(total_, note, true);
}

void Progress::Print(uint64_t done, const std::string& note, bool last) {
  std::string line = what_ + ": " + std::to_string(done);
  if (total_ > 0) line += "/" + std::to_string(total_);
  line += " " + unit_ + ", " + RateText(last ? Rate(done) : RecentRate()) + ", ";
  const std::optional<double> left = SecondsLeft();
  line += last || total_ == 0 || !left ? Duration(seconds()) : "ETA " + Duration(*left);
  if (!note.empty()) line += ", " + note;
  if (terminal_) {
    std::fprintf(stderr, "\r\033[K%s%s", line.c_str(), last ? "\n" : "");
  } else {
    std::fprintf(stderr, "%s\n", line.c_str());
  }
  std::fflush(stderr);
}

}  // namespace routecast
