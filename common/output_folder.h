// Whether an output folder can be made, before a run takes hours to find out.
// Thread rule: free functions.
#pragma once

#include <string>

#include "common/files.h"

namespace routecast {

// False where nothing is at `path`. UsageError or EnvironmentError where that cannot be
// told: no permission, a link in a circle.
bool IsThere(const fs::path& path);

// What a folder is, by the file that its maker leaves in it.
enum class FolderKind { kOther, kStore, kCheckpoint, kPredictor };
FolderKind KindOfFolder(const fs::path& folder);

// Of the value of `flag`, before anything is written there: UsageError where it is a
// file, or a store, a checkpoint or a predictor, whose files would be written over.
// `own`: what this program goes on with, or makes anew. Nothing is said of an empty path.
void RequireOutput(const std::string& flag, const fs::path& folder,
                   FolderKind own = FolderKind::kOther);

// Looks at the folder, or at its nearest parent that is there; makes nothing. UsageError
// where it is a file, or this user may not write there.
void RequireWritable(const fs::path& folder);

}  // namespace routecast
