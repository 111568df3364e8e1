// The flags of routecast-train that say what is trained, and how.
#pragma once

#include <map>
#include <string>

#include "trainer/speculation_options.h"

namespace routecast {

// Of the flags as they are now. Throws UsageError naming the flag that is wrong.
SpeculationOptions OptionsOfFlags();
// Those of them that are not at their defaults, and the seed, but for kind and steps.
std::map<std::string, std::string> GivenOptions();

}  // namespace routecast
