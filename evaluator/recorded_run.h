// A run whose output folder says what became of it.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "common/recorded_run.h"

namespace routecast {

// Runs `work`, which returns the headline figures, as common's Recorded does; without an
// `out` alone. `files`: what it writes there; those of an earlier run go as soon as
// `work` says that its inputs are sound (it calls what it is given), so that none of them
// stands beside this one's run.json.
using BeginRun = std::function<void()>;
Json Recorded(const fs::path& out, const std::vector<std::string>& files,
              const Json& configuration,
              const std::function<Json(const BeginRun&)>& work);

}  // namespace routecast
