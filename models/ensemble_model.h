// Several models asked at once, their answers mixed by weight. Members of one shape are
// one model with a leading dimension (speculation_layers.h), so that they train and run
// in batched products; shapes that differ run side by side.
#pragma once

#include <memory>
#include <vector>

#include "models/speculation_model.h"

namespace routecast {

std::unique_ptr<SpeculationModel> MakeEnsemble(const SpeculationConfig& config,
                                               const ModelSeeds& seeds);

// The seed that member `m` of an ensemble has, and with which a model alone is its equal.
uint64_t MemberSeed(uint64_t seed, int64_t m);
// Sets how much each member counts, e.g. by its validation; they are scaled to sum to 1.
// REQUIRES an ensemble and a positive sum.
void SetMemberWeights(SpeculationModel* ensemble, const std::vector<double>& weights);
// What `combine` "stack" multiplies the members' log-probabilities by, [M] float32,
// shared with the model: written into, it is what the model mixes with. REQUIRES such an
// ensemble. Of a new one each is 1 / M.
at::Tensor StackWeights(const SpeculationModel& ensemble, Stack stack, int source_layer,
                        int lead);

}  // namespace routecast
