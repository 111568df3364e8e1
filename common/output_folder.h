// Whether an output folder can be made, before a run takes hours to find out.
// Thread rule: a free function.
#pragma once

#include "common/files.h"

namespace routecast {

// Looks at the folder, or at its nearest parent that is there; makes nothing. UsageError
// where it is a file, or this user may not write there.
void RequireWritable(const fs::path& folder);

}  // namespace routecast
