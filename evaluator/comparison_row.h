// One row of a comparison while it is measured: between comparison.cc, which runs the
// rows, and comparison_summary.cc, which makes figures of them. Nobody else includes it.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "evaluator/comparison.h"

namespace routecast {

struct Comparison::Row {
  std::string policy, predictor, eviction;
  LinkEngine* link = nullptr;  // what is paced
  bool is_resident = false, is_lossy = false;
  int slots = 0;
  OracleForesight* oracle = nullptr;  // owned by the runtime
  std::unique_ptr<PrefetchRuntime> runtime;
  OutputHash hash;
  int warm_experts = 0;            // that the row began with
  double warm_seconds = 0;         // in which they were brought
  uint64_t disk_bytes = 0;         // read for a tier in the middle, in measured rounds
  std::vector<double> rates[2];    // tokens/s by round
  std::vector<double> seconds[2];  // of a round
  std::vector<double> compute_ms[2], stall_ms[2];  // of a token, by round
  std::vector<double> steps[2];
  LossyQuality quality;
};

// Of sorted values, between neighbours; 0 where there are none.
double Quantile(std::vector<double> values, double q);
double Sum(const std::vector<double>& values);

}  // namespace routecast
