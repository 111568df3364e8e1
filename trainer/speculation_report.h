// results.json and the printed table of a trained speculation model.
// Thread rule: pure functions.
#pragma once

#include <string>

#include "models/speculation_model.h"
#include "trainer/speculation_evaluation.h"
#include "trainer/speculation_options.h"

namespace routecast {

struct SpeculationReport {
  SpeculationOptions options;
  int64_t parameters = 0;
  int world_size = 1;
  int64_t steps = 0, best_step = 0;
  Json split;  // TraceDataset::SplitJson()
  ValidationScores validation;
  std::vector<ValidationScores> members;  // of an ensemble, each alone
  TestScores test;
  // Of pre-training: the further stores' validation, by name.
  std::vector<std::pair<std::string, ValidationScores>> also;
  std::vector<Json> neighbours;  // of KnnEstimate, in the order of places
  std::string shift_store;       // of another domain; empty = none
  TestScores after_shift;
  StaleControl control;
  bool has_control = false;  // router inputs were there to check
};

Json ResultsJson(const SpeculationReport& report);
// `shift_store`, `scores_after_shift` and `baselines_after_shift` of results.json.
Json AfterShiftJson(const std::string& store, const TestScores& after);
// A row a (phase, layer, lead): top-1/2/4 of the model, top-1 of the baselines. Where a
// token takes K experts: recall among the K and 2K likeliest and the first choice's
// top-1, the baselines' recall among K.
std::string ResultsTable(const SpeculationReport& report, int num_experts);

}  // namespace routecast
