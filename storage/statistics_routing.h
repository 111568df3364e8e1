// How experts follow each other and how evenly they are used: spread of load, mutual
// information between layers and with token ids, transitions, journeys of tokens through
// the layers. Formulas: docs/metrics.md. "Expert" is a token's first choice.
// Thread rule: one thread. Memory: E*E counters a pair of layers at most kMostPrevious
// apart (a hash table beyond 256 experts), one counter for each (token id, expert) seen a
// layer, and kMaxPaths paths a stack.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "storage/statistics.h"
#include "storage/trace_reader.h"

namespace routecast {

inline constexpr int kMostPrevious = 12;
inline constexpr size_t kMaxPaths = size_t{1} << 20;
inline constexpr size_t kListedPaths = 50;
inline constexpr size_t kSampledPaths = 24;

// Of the numbers of tokens that the E experts of a layer got.
struct LoadSpread {
  uint64_t total = 0;
  double mean = 0, deviation = 0, cv = 0;  // population; deviation / mean
  double skewness = 0, kurtosis = 0;       // third and fourth moment; 3 = normal
  double min = 0, q1 = 0, median = 0, q3 = 0, iqr = 0, max = 0;
  int active = 0, zero = 0;  // experts with and without tokens
  double diversity = 0;      // 2^entropy / E
};
LoadSpread SpreadOf(const std::vector<uint64_t>& counts);

struct RoutingLayer {
  LoadSpread spread;
  // Normalised mutual information with the layer 1, 2, .. before it in its stack; empty
  // for a layer without tokens.
  std::vector<double> nmi_previous;
  double nmi_token = -1;  // with the token id; negative where there are none
  // Tokens by (expert of the layer before, expert): [E*E], or empty in the first layer of
  // a stack and beyond 256 experts.
  std::vector<uint64_t> transitions;
};

// The experts that tokens took through all layers of a stack.
struct Journeys {
  struct Path {
    std::vector<uint16_t> experts;
    uint64_t count = 0;
  };
  uint64_t tokens = 0, distinct = 0;  // distinct: at most kMaxPaths
  uint64_t uncounted = 0;             // tokens whose path came after kMaxPaths others
  std::vector<Path> paths;            // most frequent first, kListedPaths of them
};

struct SampledPath {
  uint64_t sequence_id = 0;
  Stack stack = Stack::kEncoder;
  int position = 0;
  int64_t token_id = -1;  // -1: not known
  std::vector<uint16_t> experts;
};

struct RoutingStatistics {
  int num_experts = 0;
  std::vector<RoutingLayer> layers;  // by global layer
  Journeys encoder, decoder;
  std::vector<SampledPath> samples;  // kSampledPaths a stack, evenly from the store
  // What stats.json gets besides StoreStatistics': `journeys`, `sample_paths`, and in
  // `layers` `spread`, `nmi_previous`, `nmi_token`.
  Json ToJson() const;
};

// Reads the whole store once.
RoutingStatistics ComputeRoutingStatistics(const TraceReader& reader,
                                           const CountObserver& on_count = {});
// `stats` (StoreStatistics::ToJson) with what RoutingStatistics adds.
Json AllStatistics(Json stats, const RoutingStatistics& routing);
// WriteLoads' files, transitions.csv (`layer_id,previous_expert_id,expert_id,count`,
// where count > 0), and last stats.json with both.
void WriteAllStatistics(const StoreStatistics& stats, const RoutingStatistics& routing,
                        const fs::path& folder);

}  // namespace routecast
