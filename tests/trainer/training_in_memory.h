// A training run on traces in memory, and what it says where it refuses to begin.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "common/errors.h"
#include "common/files.h"
#include "tests/trainer/synthetic_traces.h"
#include "trainer/speculation_trainer.h"

namespace routecast {

inline SpeculationResult Train(const SpeculationJob& job, const SyntheticTraces& s) {
  TraceDataset dataset(s.traces, s.geometry, {.keep_top_k = true});
  LocalCommunicator comm;
  return TrainSpeculation(job, &dataset, s.routers, &comm);
}
// The text of the UsageError that the run ends with.
inline std::string Refusal(const SpeculationJob& job, const SyntheticTraces& s) {
  try {
    Train(job, s);
  } catch (const UsageError& e) {
    EXPECT_FALSE(fs::exists(job.out)) << "something was done before";
    EXPECT_LE(std::count(e.what(), e.what() + std::strlen(e.what()), '\n'), 2);
    return e.what();
  }
  return "nothing was refused";
}

}  // namespace routecast
