// A change of domain: models that learnt one store, asked about another one of the same
// traced model. Thread rule: one thread a rank; every rank makes the same calls.
#pragma once

#include <vector>

#include "trainer/speculation_trainer.h"

namespace routecast {

// Test windows of job.shift, as many a (stack, source layer) as of the job's own store.
// REQUIRES job.shift.dataset.
EvaluationData ShiftData(const SpeculationJob& job, WithHidden hidden);
// Adds to results.json's values of the finished run in `folder` what it scores on
// job.shift, where that is not in them yet; nothing where there is no such store.
void AddAfterShift(const SpeculationJob& job, const fs::path& folder,
                   const std::vector<RouterWeights>& routers, Communicator* comm,
                   Json* results);

}  // namespace routecast
