// How good a speculation model is: validation loss, calibration, and the test table
// beside its baselines. Work is dealt to ranks by micro-batch; every rank gets the same
// result, or, where a stop was requested of one of them, StoppedError within a
// micro-batch. Thread rule: one thread a rank; every rank makes the same calls.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "comm/communicator.h"
#include "models/baseline_predictors.h"
#include "models/speculation_metrics.h"
#include "trainer/speculation_backups.h"
#include "trainer/speculation_batch.h"
#include "trainer/speculation_sets.h"

namespace routecast {

struct EvaluationData {
  TraceDataset* dataset = nullptr;
  std::vector<MicroBatch> batches;      // of EvaluationBatches()
  WithHidden hidden = WithHidden::kNo;  // what the model reads
  at::Device device = at::Device("cpu");
};

struct ValidationScores {
  double loss = 0;            // mean cross-entropy over (token, lead), nats
  double top1 = 0, top4 = 0;  // of the first choice
  double recall = 0;          // of a token's K experts among the K likeliest
  int64_t labels = 0;
};
ValidationScores Validate(SpeculationModel* model, const EvaluationData& data,
                          Communicator* comm);

// The mean over stores: each counts alike, however large.
ValidationScores ValidateAll(SpeculationModel* model,
                             const std::vector<EvaluationData>& stores,
                             Communicator* comm);

// Each member's own, in the order of ForwardMembers.
std::vector<ValidationScores> ValidateMembers(SpeculationModel* model,
                                              const EvaluationData& data,
                                              Communicator* comm);

// Temperature of each (stack, source, lead) by the least negative log-likelihood: a grid
// in log temperature, refined by a parabola through the best three.
Calibration FitCalibration(SpeculationModel* model, const EvaluationData& data,
                           Communicator* comm);

// The counting baselines over the train part. Each rank counts its share and leaves it in
// `folder` (seen by all ranks); `file` gets the sum. Token tables are of the store's ids,
// and of `least_vocabulary` at least: what the model has rows for.
std::shared_ptr<const BaselineTables> FitBaselines(TraceDataset* dataset,
                                                   int least_vocabulary,
                                                   const fs::path& folder,
                                                   const fs::path& file,
                                                   Communicator* comm);

// The stale gate at distance 0: the recorded expert must be what the recorded router
// makes of the recorded input. An input is stored as bf16, so two experts whose logits
// differ by less than that rounding can move count as a tie.
struct StaleControl {
  int64_t tokens = 0, wrong = 0, ties = 0;
  double share() const { return tokens ? 1 - double(wrong) / double(tokens) : 1; }
};
// Throws DataError where one token is wrong: the table would mean nothing.
StaleControl CheckStaleGate(const std::vector<RouterWeights>& routers,
                            const EvaluationData& data, Communicator* comm);

struct TestScores {
  std::vector<LeadScores> model;
  std::vector<LeadScores> uncalibrated;  // the same without temperatures
  std::vector<SetScores> sets;           // of the encoder's sequences
  std::vector<BackupScores> backups;     // where the model has heads for them
  // By baseline name, in the order of BaselineNames(); leads that a baseline cannot
  // predict are left out.
  std::vector<std::pair<std::string, std::vector<LeadScores>>> baselines;
};
// `routers` may be empty: no stale gate then.
TestScores Test(SpeculationModel* model, const Calibration& calibration,
                const std::shared_ptr<const BaselineTables>& tables,
                const std::vector<RouterWeights>& routers, const EvaluationData& data,
                uint64_t seed, Communicator* comm);

}  // namespace routecast
