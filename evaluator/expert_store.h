// The cache of expert files: one a checkpoint and dtype, or one a synthetic geometry;
// written once, reused by every later run, rewritten when damaged.
#pragma once

#include <memory>

#include "evaluator/expert_file.h"
#include "models/checkpoint.h"

namespace routecast {

// The folder for expert files: `flag` where given, else $ROUTECAST_CACHE,
// $XDG_CACHE_HOME or ~/.cache, each with routecast/experts below it.
fs::path ExpertCacheFolder(const std::string& flag);

// Of fp32, bf16 and fp16.
ExpertDtype ExpertDtypeOf(at::ScalarType dtype);
// What the experts of a checkpoint are on disk in `dtype`, without its content's id.
// UsageError: experts that cannot be moved one by one, or a type that they have not.
ExpertFileSpec SpecOfCheckpoint(const SwitchConfig& config, at::ScalarType dtype);
// The experts of a checkpoint folder, in `dtype` (fp32, bf16 or fp16). `fingerprint` as
// LoadCheckpoint gives it.
std::shared_ptr<const ExpertFile> ExpertsOfCheckpoint(const fs::path& cache_folder,
                                                      const fs::path& checkpoint,
                                                      const SwitchConfig& config,
                                                      const std::string& fingerprint,
                                                      at::ScalarType dtype, bool quiet);
// Synthetic experts of the MoE layers of the stacks asked for, drawn in fp32 and stored
// as `dtype`.
std::shared_ptr<const ExpertFile> SyntheticExperts(const fs::path& cache_folder,
                                                   const MoeGeometry& geometry, int d_ff,
                                                   uint64_t seed, bool encoder,
                                                   bool decoder, at::ScalarType dtype,
                                                   bool quiet);

}  // namespace routecast
