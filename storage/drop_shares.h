// How many choices capacity dropped, of a sample: what people should hear before they
// train on a store. Statistics (statistics.h) read all of it.
#pragma once

#include <optional>
#include <string>

#include "storage/trace_reader.h"

namespace routecast {

inline constexpr size_t kDropSample = 500;  // sequences
inline constexpr double kManyDrops = 0.05;  // a share that is worth a hint

struct DropShares {
  size_t sequences = 0;  // that were read
  // Shares of the choices (tokens x MoE layers); none where drops were not recorded.
  std::optional<double> encoder, decoder;
  bool many() const;  // in a stack
};

// Reads at most `most` sequences (above 0), evenly spaced over the store: all of a store
// that has no more. Throws as TraceReader's Read.
DropShares SampleDrops(const TraceReader& reader, size_t most = kDropSample);

// "35.1 % of choices in the encoder, 0.0 % in the decoder"; with "about" where not all
// sequences of the store were read. Empty where nothing was recorded.
std::string DropsText(const DropShares& shares, size_t of_sequences);

// What they are and what can be done about many, in one line.
std::string DropsHint();

}  // namespace routecast
