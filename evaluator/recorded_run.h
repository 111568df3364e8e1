// A run whose output folder says what became of it.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "common/run_record.h"

namespace routecast {

// Runs `work`, which returns the headline figures, with a run.json in `out` that says
// from the start on that it runs and in the end how it ended, whatever `work` throws
// (which goes on to the caller). `files`: what it writes there; those of an earlier run
// go first, so that none of them stands beside this one's run.json.
Json Recorded(const fs::path& out, const std::vector<std::string>& files,
              const Json& configuration, const std::function<Json()>& work);

}  // namespace routecast
