// DecodeMatrix (expert_codec.h) on a CUDA device: the same values, bit for bit.
// Thread rule: any thread; the work is enqueued on `stream` and the host does not wait.
#pragma once

#include "evaluator/expert_codec.h"

namespace routecast {

// `coded` and `weights` are device memory, 4-byte aligned; `stream` is a cudaStream_t.
// Throws EnvironmentError where the launch is refused.
void DecodeMatrixOnDevice(CopyKind kind, const std::byte* coded, uint64_t rows,
                          uint64_t columns, ExpertDtype dtype, std::byte* weights,
                          void* stream);

}  // namespace routecast
