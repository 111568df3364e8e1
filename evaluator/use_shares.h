// How often each expert was used, by count: what a cache starts with, and what is warmed.
// Torch-free. Thread rule: plain data and pure functions.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/files.h"
#include "common/routing.h"

namespace routecast {

struct UseShares {
  std::string source;          // what was counted, for reports
  std::vector<double> by_key;  // share of its layer's uses; 0 where the layer has none
};

// `counts` by key.
UseShares SharesOf(const std::vector<uint64_t>& counts, const MoeGeometry& geometry,
                   std::string source);
// load.csv of routecast-trace stats (`layer_id,expert_id,count`). UsageError: no such
// file, or counts of another geometry; DataError: no such table.
UseShares ReadUseShares(const fs::path& csv, const MoeGeometry& geometry);
// The `count` most used of `keys`, the most used last: in that order a cache is filled.
// Those that were never used are left out.
std::vector<ExpertKey> MostUsed(const UseShares& shares, const MoeGeometry& geometry,
                                std::vector<ExpertKey> keys, size_t count);

}  // namespace routecast
