// What predictors say on recorded test sequences when they are asked as the runtime asks
// them: a decoder token by token with the history that they keep, an encoder once a
// layer. Scores, how sure and how steady they are, and what a question costs. Thread
// rule: one thread.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "models/expert_predictor.h"
#include "models/speculation_metrics.h"
#include "storage/trace_reader.h"

namespace routecast {

struct QualityOptions {
  int sequences = 200;  // of the test part, at most
  int tokens = 16;      // decoder tokens of a sequence, at most
  uint64_t seed = 1;    // of the bootstrap
  bool quiet = false;
};

// One (phase, source layer, lead) of a predictor. docs/metrics.md has the formulas.
struct QualityScores {
  LeadScores scores;
  double confidence_correlation = 0;  // of the largest p with being right; NaN: constant
  double variation = 0;  // mean total variation between neighbouring tokens' answers
};

struct PredictorQuality {
  std::string predictor;
  std::vector<QualityScores> places;
  double p50_us = 0, p95_us = 0;  // of one question
  int64_t questions = 0;
  Json ToJson() const;
};

// Throws UsageError where no test sequence serves.
std::vector<PredictorQuality> MeasureQuality(
    const TraceReader& reader,
    const std::vector<std::unique_ptr<ExpertPredictor>>& predictors,
    const QualityOptions& options);
std::string QualityTable(const std::vector<PredictorQuality>& all);

}  // namespace routecast
