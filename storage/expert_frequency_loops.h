// What goes over all experts in ExpertFrequencies, in a scalar and a wide form that make
// the same numbers. Inside this room and for its tests. Thread rule: any thread.
// Shape letters: E experts.
#pragma once

#include "storage/factor_rows.h"

namespace routecast {

// `ends` [E to whole vectors, aligned as a vector]: where each expert's weight ends.
struct FrequencyLoops {
  // Of `base` [padded], times a dense row; null: of `base` alone.
  void (*fill_all)(const uint16_t* base, const int8_t* row, size_t padded,
                   uint32_t* ends);
  // As ExpertFrequencies::FillOwn and FillRest.
  uint32_t (*fill_own)(const uint16_t* cumulative, size_t num_experts, const int8_t* row,
                       uint32_t* ends);
  void (*fill_rest)(const uint16_t* cumulative, size_t num_experts, const int8_t* row,
                    uint32_t* ends);
  // To the ends of expert `first` and those behind it, modulo 2^32.
  void (*add_from)(size_t first, uint32_t amount, size_t padded, uint32_t* ends);
};

const FrequencyLoops& ScalarFrequencyLoops();
// Null where this CPU has no AVX2.
const FrequencyLoops* WideFrequencyLoops();
// The wide ones where they are, found once.
const FrequencyLoops& ChosenFrequencyLoops();

}  // namespace routecast
