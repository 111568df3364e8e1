// The kinds behind MakeSpeculationModel (which checks the configuration first).
#pragma once

#include <memory>

#include "models/speculation_model.h"

namespace routecast {

// Context of expert ids alone: the published inter-layer model with a padding id, a slot
// mask, embeddings of stack, source layer and lead, and all leads in one pass.
std::unique_ptr<SpeculationModel> MakeInterlayerModel(const SpeculationConfig& config,
                                                      uint64_t seed);
// The router's input at the source layer with the token and its experts: small enough to
// predict between two layers.
std::unique_ptr<SpeculationModel> MakeHiddenModel(const SpeculationConfig& config,
                                                  uint64_t seed);

}  // namespace routecast
