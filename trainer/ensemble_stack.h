// The meta-learner of an ensemble (`combine` "stack"): a weight a member, stack, source
// layer and lead, that log-probabilities are summed by. M members.
#pragma once

#include <vector>

#include "comm/communicator.h"
#include "trainer/speculation_evaluation.h"

namespace routecast {

// Sets the ensemble's StackWeights to those of the least cross-entropy over `data`, with
// a pull towards 1 / M as strong as one label. REQUIRES documents that no member learnt
// from. Places that have no label stay. Every rank gets the same bits.
void FitStack(SpeculationModel* ensemble, const EvaluationData& data, Communicator* comm);

}  // namespace routecast
