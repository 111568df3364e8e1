// What is expected of one layer visit ahead: what foresight tells the planner.
#pragma once

#include <vector>

namespace routecast {

struct LayerForecast {
  int layer = 0;                     // global MoE layer
  int distance = 0;                  // layer visits ahead, >= 1
  std::vector<float> probabilities;  // [experts]: that any live token needs it
};

}  // namespace routecast
