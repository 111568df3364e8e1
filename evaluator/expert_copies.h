// An expert file's compressed copy, and the decoding of one expert of it. LOSSY: rows
// that run on it are named so. Torch-free. Thread rule: free functions.
#pragma once

#include <memory>

#include "evaluator/expert_file.h"

namespace routecast {

// The file beside `file` that holds its experts as `kind` ("x-int8.experts"): opened
// where it is whole and of this content, else written. DataError where a weight is not
// finite, EnvironmentError where the disk is full. REQUIRES a lossless file.
std::shared_ptr<const ExpertFile> CompressedCopy(
    const std::shared_ptr<const ExpertFile>& file, CopyKind kind, bool quiet);

// A blob of a compressed file -> wi [d_ff, d_model], wo [d_model, d_ff] in the file's
// dtype, spec.expert_bytes() in all.
void DecodeExpert(const ExpertFileSpec& spec, const std::byte* blob, std::byte* expert);

}  // namespace routecast
