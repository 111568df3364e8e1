#include "trainer/learning_schedule.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numbers>
#include <string_view>

#include "common/errors.h"

namespace routecast {
namespace {

constexpr double kCycleUp = 0.1, kCycleFirst = 1.0 / 25, kCycleLast = 1.0 / 250000;
constexpr double kMostBeta1 = 0.95, kLeastBeta1 = 0.85;

// From 1 to `last` as `done` goes from 0 to 1.
double Cosine(double done, double last) {
  const double wave = 0.5 * (1 + std::cos(std::numbers::pi * std::clamp(done, 0.0, 1.0)));
  return last + (1 - last) * wave;
}

double OneCycle(double done) {
  if (done < kCycleUp) return 1 - (Cosine(done / kCycleUp, 0) * (1 - kCycleFirst));
  return Cosine((done - kCycleUp) / (1 - kCycleUp), kCycleLast);
}

// Throws where something is said that this schedule does not look at.
void RefuseOthers(const LearningSchedule& s) {
  const LearningSchedule usual;
  struct Said {
    const char* flag;
    bool said;
    std::string_view of;  // the schedule that looks at it; "" = all but one_cycle
  };
  const Said all[] = {
      {"--restart_steps", s.restart_steps != usual.restart_steps, "restarts"},
      {"--restart_epochs", s.restart_epochs != usual.restart_epochs, "restarts"},
      {"--restart_growth", s.restart_growth != usual.restart_growth, "restarts"},
      {"--plateau_factor", s.plateau_factor != usual.plateau_factor, "plateau"},
      {"--plateau_patience", s.plateau_patience != usual.plateau_patience, "plateau"},
      {"--warmup_steps", s.warmup_steps != usual.warmup_steps, ""}};
  for (const auto& [flag, said, of] : all) {
    if (!said || (of.empty() ? s.name != "one_cycle" : s.name == of)) continue;
    const std::string what = of.empty() ? "of no one_cycle, which warms up by itself"
                                        : "of --schedule=" + std::string(of);
    throw UsageError(ErrorText(std::string(flag) + " is " + what,
                               "--schedule=" + s.name + " does not look at it",
                               "leave it out, or use another schedule"));
  }
}

}  // namespace

Json LearningSchedule::ToJson() const {
  Json json{{"name", name},
            {"warmup_steps", warmup_steps},
            {"last_share", last_share},
            {"restart_steps", restart_steps},
            {"restart_growth", restart_growth},
            {"plateau_factor", plateau_factor},
            {"plateau_patience", plateau_patience}};
  if (restart_epochs > 0) json["restart_epochs"] = restart_epochs;
  if (cycle_beta1) json["cycle_beta1"] = true;
  return json;
}

LearningSchedule LearningSchedule::InEpochsOf(int64_t steps_per_epoch) const {
  LearningSchedule schedule = *this;
  if (restart_epochs > 0) schedule.restart_steps = restart_epochs * steps_per_epoch;
  return schedule;
}

void LearningSchedule::Validate() const {
  ParseChoice("--schedule", name,
              {"cosine", "restarts", "plateau", "constant", "one_cycle"});
  const auto require = [](bool good, const char* flag, double value, const char* range) {
    if (good) return;
    char text[32];
    std::snprintf(text, sizeof text, "it is %g", value);
    throw UsageError(ErrorText(std::string(flag) + " is out of range", text,
                               std::string("use ") + range));
  };
  require(warmup_steps >= 0, "--warmup_steps", warmup_steps, "0 or more");
  require(last_share >= 0 && last_share <= 1, "--last_rate", last_share, "0 to 1");
  require(restart_steps >= 0, "--restart_steps", static_cast<double>(restart_steps),
          "0 or more");
  require(restart_epochs >= 0 && (restart_epochs == 0 || restart_steps == 0),
          "--restart_epochs", restart_epochs, "0 or more, without --restart_steps");
  require(restart_growth >= 1 && restart_growth <= 10, "--restart_growth", restart_growth,
          "1 to 10");
  require(plateau_factor > 0 && plateau_factor < 1, "--plateau_factor", plateau_factor,
          "a number above 0 and below 1");
  require(plateau_patience > 0, "--plateau_patience", plateau_patience, "1 or more");
  RefuseOthers(*this);
  if (cycle_beta1 && name != "one_cycle") {
    throw UsageError(ErrorText("--cycle_beta1 is of --schedule=one_cycle",
                               "--schedule=" + name + " has no cycle",
                               "leave it out, or use that schedule"));
  }
}

double LearningSchedule::Beta1(int64_t step, int64_t steps, double otherwise) const {
  if (!cycle_beta1) return otherwise;
  const double done =
      static_cast<double>(step) / static_cast<double>(std::max<int64_t>(1, steps));
  // How far below the largest: as far as the rate is above its ends.
  const double depth = done < kCycleUp ? 1 - Cosine(done / kCycleUp, 0)
                                       : Cosine((done - kCycleUp) / (1 - kCycleUp), 0);
  return kMostBeta1 - (kMostBeta1 - kLeastBeta1) * depth;
}

double LearningSchedule::Share(int64_t step, int64_t steps, int lowered) const {
  const auto total = static_cast<double>(std::max<int64_t>(1, steps));
  if (name == "one_cycle") return OneCycle(static_cast<double>(step) / total);
  const auto warmup = std::min<int64_t>(warmup_steps, steps / 10 + 1);
  if (step < warmup) return static_cast<double>(step + 1) / static_cast<double>(warmup);
  if (name == "constant") return 1;
  if (name == "plateau") return std::max(last_share, std::pow(plateau_factor, lowered));
  auto at = static_cast<double>(step - warmup);
  if (name == "restarts") {
    double wave =
        restart_steps > 0 ? static_cast<double>(restart_steps) : std::max(1.0, total / 5);
    while (at >= wave) {
      at -= wave;
      wave *= restart_growth;
    }
    return Cosine(at / wave, last_share);
  }
  return Cosine(at / std::max(1.0, total - static_cast<double>(warmup)), last_share);
}

}  // namespace routecast
