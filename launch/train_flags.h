// The flags of routecast-train that say what is trained, and how.
#pragma once

#include "trainer/speculation_options.h"

namespace routecast {

// Of the flags as they are now. Throws UsageError naming the flag that is wrong.
SpeculationOptions OptionsOfFlags();

}  // namespace routecast
