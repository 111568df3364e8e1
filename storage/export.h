// A trace store as files that other programs read (product.md, "Export").
// Thread rule: one thread. Memory: one part.
#pragma once

#include <string>
#include <vector>

#include "storage/trace_reader.h"

namespace routecast {

struct ExportOptions {
  std::string format = "npz";  // npz, jsonl, csv or safetensors
  // Arrays of a part are held in memory; a larger store becomes traces-00000.npz and on.
  uint64_t max_part_bytes = uint64_t{1} << 30;
};

// Writes traces.<format> (or parts) into `folder`, sequences ascending by id; returns the
// files. Other parts of that format, of an earlier export, are removed. UsageError for an
// unknown format; StoppedError where a stop was requested.
std::vector<fs::path> ExportTraces(const TraceReader& reader, const fs::path& folder,
                                   const ExportOptions& options);

// About what ExportTraces would write; of arrays a little more.
uint64_t ExportedBytes(const TraceReader& reader, const std::string& format);

// What the store holds and jsonl and csv leave out; empty where that is nothing.
std::string LeftOutOfText(const StoreConfig& config);

}  // namespace routecast
