// Dropout masks as a function of a key, many times faster than a generator of doubles:
// a step draws one number for each activation. Thread rule: any thread.
#pragma once

#include <cstdint>

namespace routecast {

// mask[0..count) = 0 with `probability` (to 1/65,536), else what keeps the mean at 1. A
// prefix of a longer mask of the same key is the shorter one.
void FillDropoutMask(uint64_t key, double probability, int64_t count, float* mask);

}  // namespace routecast
