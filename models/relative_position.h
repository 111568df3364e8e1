// T5's buckets of relative positions. Reference: transformers 5.23.0. Any thread.
#pragma once

#include <ATen/core/Tensor.h>

namespace routecast {

// relative: int64, key minus query, any shape -> bucket 0..buckets-1 of each. Half of the
// buckets are exact, the others grow with the logarithm up to max_distance.
// bidirectional: keys to the right have the upper half; else they are in bucket 0.
at::Tensor RelativeBuckets(at::Tensor relative, bool bidirectional, int64_t buckets,
                           int64_t max_distance);

}  // namespace routecast
