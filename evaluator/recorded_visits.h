// Recorded routing as a simulation takes it: the visits of a sequence's passes, what they
// cost the model, and what a foresight says at each. Thread rule: one thread.
#pragma once

#include <vector>

#include "common/routing.h"
#include "evaluator/foresight.h"
#include "evaluator/prefetch_simulation.h"

namespace routecast {

// UsageError where tokens of `geometry` take several experts: what is played here moves
// one a token, and would be of another model. `what`: who plays it.
void RequireOneExpertAToken(const MoeGeometry& geometry, const std::string& what);

// Seconds of the model's own work in a decoder's step of one sequence.
struct StepCosts {
  double between_layers = 0;  // from one MoE layer's experts to the next one's choice
  double expert = 0;          // computing one
  double head = 0;            // after the last MoE layer, with the vocabulary
  double question = 0;        // to a predictor
};

// The experts [K, or fewer: distinct] that token `t` of `span` takes at MoE layer `layer`
// of its stack. DataError where the trace does not hold all of them.
std::vector<int> ChoicesOf(const RoutingSpan& span, const MoeGeometry& geometry,
                           int layer, int t);
// The visits of the decoder's steps over one sequence, with what `foresight` (null =
// nobody) says of them; without token ids it is told ids of 0.
void AppendVisits(const RoutingTrace& trace, const MoeGeometry& geometry, int tokens,
                  const StepCosts& costs, Foresight* foresight,
                  std::vector<SimulatedVisit>* visits);
// The same of the encoder's pass over `tokens` of them at most, whose layers need every
// expert that one of the tokens chose.
void AppendEncoderVisits(const RoutingTrace& trace, const MoeGeometry& geometry,
                         int tokens, const StepCosts& costs, Foresight* foresight,
                         std::vector<SimulatedVisit>* visits);
// What is said replaced by the true next `horizon` visits.
std::vector<SimulatedVisit> WithOracle(std::vector<SimulatedVisit> visits,
                                       int num_experts, size_t horizon);

}  // namespace routecast
