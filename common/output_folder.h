// Whether an output folder can be made, before a run takes hours to find out.
// Thread rule: free functions.
#pragma once

#include "common/files.h"

namespace routecast {

// False where nothing is at `path`. UsageError or EnvironmentError where that cannot be
// told: no permission, a link in a circle.
bool IsThere(const fs::path& path);

// Looks at the folder, or at its nearest parent that is there; makes nothing. UsageError
// where it is a file, or this user may not write there.
void RequireWritable(const fs::path& folder);

}  // namespace routecast
