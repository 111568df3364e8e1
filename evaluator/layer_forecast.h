// What is expected of one layer visit ahead: what foresight tells the planner.
// Torch-free. Thread rule: plain data.
#pragma once

#include <span>
#include <vector>

namespace routecast {

struct LayerForecast {
  // In place of a distance: of every visit of the layer that nothing else is said of,
  // until the sequence ends or more is said.
  static constexpr int kLater = 0;
  int layer = 0;                     // global MoE layer
  int distance = 0;                  // layer visits ahead, >= 1, or kLater
  std::vector<float> probabilities;  // [experts]: that any live token needs it
};

struct ForetoldExpert {
  int expert = 0;
  float probability = 0;
};

// A forecast that is told many times over, ranked once: a scan of all its numbers is most
// of what telling it takes. Views of what somebody keeps.
constexpr float kRankedFrom = 0.05f;
struct RankedForecast {
  int layer = 0, distance = 0;  // as LayerForecast has them
  bool sound = true;            // all numbers are probabilities; else nothing is ranked
  std::span<const float> probabilities;
  std::span<const ForetoldExpert> ranked;  // as RankExperts has those of kRankedFrom on
};

// Numbers outside [0, 1] go to its nearest end, what is not finite to 0.
void MakeProbabilities(std::vector<float>* numbers);
// The experts of `least` or more, best first; of equals the lower one. False where a
// number is no probability.
bool RankExperts(std::span<const float> probabilities, float least,
                 std::vector<ForetoldExpert>* ranked);

}  // namespace routecast
