// The text forms of an export, jsonl and csv (export.h).
// Thread rule: one thread. Memory: one sequence.
#pragma once

#include <string>
#include <vector>

#include "storage/trace_reader.h"

namespace routecast {

// k where the model routes to several experts and all of them are stored, else 0. They
// are the first k of the top-k.
int ActiveExperts(const StoreConfig& config);

// traces.<format> in `folder`; `format` is jsonl or csv. StoppedError where a stop was
// requested: nothing is left then.
std::vector<fs::path> ExportText(const TraceReader& reader, const fs::path& folder,
                                 const std::string& format);

}  // namespace routecast
