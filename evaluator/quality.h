// What predictors say on recorded test sequences when they are asked as the runtime asks
// them: a decoder token by token with the history that they keep, an encoder once a
// layer. Scores, how sure and how steady they are, and what a question costs. Thread
// rule: one thread.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "evaluator/answer_log.h"
#include "evaluator/quality_statistics.h"
#include "models/expert_predictor.h"
#include "models/speculation_metrics.h"
#include "storage/trace_reader.h"

namespace routecast {

struct QualityOptions {
  int sequences = 200;           // of the test part, at most
  int tokens = 16;               // decoder tokens of a sequence, at most
  uint64_t seed = 1;             // of the bootstrap
  AnswerLog* answers = nullptr;  // MeasureQuality puts all answers there; null: nowhere
  bool quiet = false;
};

// One (phase, source layer, lead) of a predictor. docs/metrics.md has the formulas.
struct QualityScores {
  LeadScores scores;
  double confidence_correlation = 0;  // of the largest p with being right; NaN: constant
  double ece_equal_mass = 0;          // 15 bins of as many answers each
  double confidence_variation = 0;    // mean change between neighbouring tokens
  double variation = 0;       // mean total variation between neighbouring tokens' answers
  RouterAgreement agreement;  // where the store has the routers' own top-k
  int64_t unanswered = 0;     // labels of failed questions, wrong ones among the samples
};

struct PredictorQuality {
  std::string predictor;
  std::vector<QualityScores> places;
  double p50_us = 0, p95_us = 0;         // of one question
  int64_t questions = 0;                 // those that failed too
  int64_t failed_questions = 0;          // threw, or were answered by what is no answer
  std::string first_failure;             // in the first one's words
  std::optional<Adaptation> adaptation;  // after a change of domain
  Json ToJson() const;
};

// Throws UsageError where nobody is to be asked, or no test sequence serves.
void CheckQuality(const TraceReader& reader,
                  const std::vector<std::unique_ptr<ExpertPredictor>>& predictors);
// The same for a shift from one store to another, which are to be of one model.
void CheckShift(const TraceReader& from, const TraceReader& to,
                const std::vector<std::unique_ptr<ExpertPredictor>>& predictors);
// Throws as CheckQuality.
std::vector<PredictorQuality> MeasureQuality(
    const TraceReader& reader,
    const std::vector<std::unique_ptr<ExpertPredictor>>& predictors,
    const QualityOptions& options);
// The same on two stores of one model, one after the other, with what predictors have
// learnt by then: a change of domain. Throws UsageError where their geometries differ.
struct ShiftedQuality {
  std::vector<PredictorQuality> before, after;
};
ShiftedQuality MeasureShift(
    const TraceReader& from, const TraceReader& to,
    const std::vector<std::unique_ptr<ExpertPredictor>>& predictors,
    const QualityOptions& options);
std::string QualityTable(const std::vector<PredictorQuality>& all);

}  // namespace routecast
