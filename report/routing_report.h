// The page of a store's routing statistics: load, spread, information between layers,
// transitions, journeys. Thread rule: pure functions, any thread.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/files.h"
#include "common/run_record.h"

namespace routecast {

struct TransitionMap {
  std::string phase;
  int layer = 0;                 // in its stack; from the layer before it
  std::vector<uint64_t> counts;  // [E*E], by (expert of the layer before, expert)
};

struct RoutingPage {
  std::string store;  // named in the subtitle
  Json stats;         // as stats.json
  std::vector<TransitionMap> transitions;
};

// Sections: key figures, load, spread, information, transitions, journeys, probabilities;
// those without values are left out. At most kMapsShown transition maps, evenly chosen,
// of at most 128 x 128 cells: the page stays below HtmlReport::kMaxBytes.
inline constexpr size_t kMapsShown = 12;
std::string RoutingReportHtml(const RoutingPage& page);

}  // namespace routecast
