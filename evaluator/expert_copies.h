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

// What a compressed copy gains and costs before anything runs.
struct CopyFigures {
  double ratio = 1;         // an expert's bytes / its copy's
  double weight_error = 0;  // mean |copy - weight|
  double weight_scale = 0;  // mean |weight| of the same, to hold it against
};
// From at most `sample` experts, evenly spaced over the file, all their weights.
// DataError where one of them is damaged. REQUIRES `copy` of CompressedCopy(file, ...).
CopyFigures MeasureCopy(const ExpertFile& file, const ExpertFile& copy, int sample = 16);

// A blob of a compressed file -> wi [d_ff, d_model], wo [d_model, d_ff] in the file's
// dtype, spec.expert_bytes() in all.
void DecodeExpert(const ExpertFileSpec& spec, const std::byte* blob, std::byte* expert);

}  // namespace routecast
