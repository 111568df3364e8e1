// Where a model named on the command line lies: a folder, or a name in the local Hugging
// Face cache. Nothing is downloaded. Thread rule: reads the environment; not beside
// setenv.
#pragma once

#include <string>

#include "common/files.h"

namespace routecast {

// A folder is returned as it is. Else `name` is OWNER/NAME or NAME, with @REVISION (a
// branch, a tag or a commit; default main), and its snapshot in the cache is returned:
// CACHE/models--OWNER--NAME/snapshots/COMMIT. An empty name stays empty.
// Throws UsageError naming what was looked at and the command that fetches the model.
fs::path FindModelFolder(const std::string& name);

// The cache of huggingface_hub: HF_HUB_CACHE, else HUGGINGFACE_HUB_CACHE, else
// HF_HOME/hub, else XDG_CACHE_HOME/huggingface/hub, else ~/.cache/huggingface/hub.
fs::path HuggingFaceCache();

}  // namespace routecast
